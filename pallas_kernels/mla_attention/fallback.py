"""Attention in XLA, block by block in both directions: no piece has more than BLOCK queries and BLOCK keys.

Tokens lie in equal blocks. A block's queries and its own keys are the diagonal: they are cut into chunks, each of which
reads only the keys that it may see, in one piece. Up to BLOCK tokens that is all. Each pair of a block of queries and an
earlier block of keys is a tile, which one loop over the pairs that are not empty adds to what is there: of the forward
pass by the log-sum-exp, of the backward pass as sums. With `q_offset` there is no diagonal, and every tile is masked.

The backward pass recomputes the weights of a piece from the log-sum-exp. A CPU multiplies a left operand that it has to
transpose at half the speed: scores are held [t, s] forward, and keys first, [s, t], backward, where two of three products
want them so.

Legend: b batch, h heads, t query token, s key token, k query and key width, v value width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Measured on one CPU at 4,096 tokens: blocks of 512 and 1,024 take 1.11 and 1.21 times as long, whose scores leave the caches;
# 128 takes 0.97 of the time, in four times as many tiles. Other lengths were not compared with 128 and 1,024.
BLOCK = 256
# A chunk is a dense product; below this many rows its overhead shows, above it masked work does.
CHUNK = 64


# --- a piece: some queries and some keys ------------------------------------------------------------------------


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Accumulated in float32; float32 operands are not rounded to TF32."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _weighted(q, k, v, seen) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of values by exp(score - top), top, sum of those weights); seen [.., .., s, t] bool, None: every key."""
    s = _dot("bhtk,bhsk->bhts", q, k)
    if seen is not None:
        s = jnp.where(seen.swapaxes(-1, -2), s, -jnp.inf)
    top = s.max(-1)
    p = jnp.exp(s - jnp.where(top == -jnp.inf, 0, top)[..., None])
    return _dot("bhts,bhsv->bhtv", p.astype(v.dtype), v), top, p.sum(-1)


def _gradients(q, k, v, seen, lse, delta, do) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the piece adds to the gradients of q, k and v, float32; `seen` as above."""
    p = jnp.exp(_dot("bhsk,bhtk->bhst", k, q) - lse[:, :, None])
    if seen is not None:
        p = jnp.where(seen, p, 0)
    dp = _dot("bhsv,bhtv->bhst", v, do)
    ds = (p * (dp - delta[:, :, None])).astype(q.dtype)
    dq = _dot("bhst,bhsk->bhtk", ds, k)
    return dq, _dot("bhst,bhtk->bhsk", ds, q), _dot("bhst,bhtv->bhsv", p.astype(v.dtype), do)


# --- the diagonal: each query sees the keys up to its own ----------------------------------------------------------


def _chunks(t: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk of queries."""
    for start in range(0, t, CHUNK):
        yield start, min(start + CHUNK, t)


def _seen(segments, start: int, end: int) -> jax.Array:
    """Which keys 0..end-1 the queries start..end-1 see: [b or 1, 1, s, t]; segments [b, 1, t] or None."""
    seen = (jnp.arange(end)[:, None] <= jnp.arange(start, end)[None])[None, None]
    if segments is None:
        return seen
    return seen & (segments[..., :end, None] == segments[..., None, start:end])


def _diagonal(q, k, v, segments, dtype) -> tuple[jax.Array, jax.Array]:
    """(out, lse); out in `dtype`."""
    outs, lses = [], []
    for start, end in _chunks(q.shape[2]):
        seen = _seen(segments, start, end)
        o, top, total = _weighted(q[:, :, start:end], k[:, :, :end], v[:, :, :end], seen)
        outs.append((o / total[..., None]).astype(dtype))
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)


def _diagonal_gradients(q, k, v, segments, lse, delta, do) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, float32. The first, longest piece starts the sums of keys and values."""
    dqs, sums = [], None
    for start, end in reversed(list(_chunks(q.shape[2]))):
        rows = (slice(None), slice(None), slice(start, end))
        seen = _seen(segments, start, end)
        dq, *new = _gradients(q[rows], k[:, :, :end], v[:, :, :end], seen, lse[rows], delta[rows], do[rows])
        dqs.append(dq)
        sums = new if sums is None else [_plus(x, y, 0) for x, y in zip(sums, new, strict=True)]
    assert sums is not None
    return jnp.concatenate(dqs[::-1], axis=2), sums[0], sums[1]


# --- blocks ---------------------------------------------------------------------------------------------------------


def _block_size(t: int) -> int:
    """Of t tokens in as few blocks as there must be: a multiple of 8, at most BLOCK."""
    return 8 * -(-t // (8 * -(-t // BLOCK)))


def _padded(x: jax.Array, size: int, **how: Any) -> jax.Array:
    """x [b, h, t, ...], t filled up to a multiple of `size`."""
    pad = -x.shape[2] % size
    return jnp.pad(x, [(0, 0), (0, 0), (0, pad), *[(0, 0)] * (x.ndim - 3)], **how) if pad else x


def _rows(x: jax.Array, i: jax.Array, size: int) -> jax.Array:
    """Block i of x [b, h, t, ...]."""
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=2)


def _put(x: jax.Array, new: jax.Array, i: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, new, i * new.shape[2], axis=2)


def _plus(x: jax.Array, new: jax.Array, i: Any) -> jax.Array:
    """x with `new` added to its block i."""
    return _put(x, lax.dynamic_slice_in_dim(x, i * new.shape[2], new.shape[2], axis=2) + new, i)


def _earlier(segments, size: int, n: int) -> tuple[Any, Any]:
    """(block of queries, earlier block of keys) of each tile [p, 2], and how many of them, the first, are to be computed:
    those with a segment in common, as far as their smallest and largest tell, in any sequence."""
    pairs = np.stack(np.tril_indices(n, -1), axis=1)
    if segments is None:
        return pairs, len(pairs)
    blocks = segments.reshape(-1, n, size)
    low, high = blocks.min(-1), blocks.max(-1)
    i, j = pairs.T
    return _first(pairs, ((low[:, i] <= high[:, j]) & (low[:, j] <= high[:, i])).any(0))


def _first(pairs: np.ndarray, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pairs, those that are wanted first; and how many are."""
    return jnp.asarray(pairs)[jnp.argsort(~wanted, stable=True)], wanted.sum()


def _over(pairs: Any, count: Any, step: Callable[..., Any], start: Any) -> Any:
    """step(state, i, j) for the first `count` pairs."""
    pairs = jnp.asarray(pairs, jnp.int32)
    return lax.fori_loop(0, count, lambda x, state: step(state, pairs[x, 0], pairs[x, 1]), start)


# --- forward --------------------------------------------------------------------------------------------------------


def mla_attention(q, k, v, segments, q_offset) -> tuple[jax.Array, jax.Array]:
    """q [b, h, t, k], k [b, h, s, k], v [b, h, s, v] -> (out [b, h, t, v], lse [b, h, t])."""
    segments = None if segments is None else segments[:, None]
    if q_offset is not None:
        return _at_offset(q, k, v, q_offset)
    if q.shape[2] <= BLOCK:
        return _diagonal(q, k, v, segments, v.dtype)
    return _blockwise(q, k, v, segments)


def _blockwise(q, k, v, segments) -> tuple[jax.Array, jax.Array]:
    t, size = q.shape[2], _block_size(q.shape[2])
    q, k, v = (_padded(x, size) for x in (q, k, v))
    segments = None if segments is None else _padded(segments, size, mode="edge")
    n = q.shape[2] // size

    def diagonal(i, state):
        own = None if segments is None else _rows(segments, i, size)
        new = _diagonal(_rows(q, i, size), _rows(k, i, size), _rows(v, i, size), own, jnp.float32)
        return tuple(_put(x, y, i) for x, y in zip(state, new, strict=True))

    def tile(state, i, j):
        seen = None
        if segments is not None:
            seen = _rows(segments, j, size)[..., None] == _rows(segments, i, size)[..., None, :]
        return _merged(state, _weighted(_rows(q, i, size), _rows(k, j, size), _rows(v, j, size), seen), i)

    state = lax.fori_loop(0, n, diagonal, _nothing(q, v))
    return _finished(_over(*_earlier(segments, size, n), tile, state), t, v.dtype)


def _at_offset(q, k, v, q_offset) -> tuple[jax.Array, jax.Array]:
    (b, _, t, _), s = q.shape, k.shape[2]
    rows, cols = _block_size(t), _block_size(s)
    q, k, v = _padded(q, rows), _padded(k, cols), _padded(v, cols)
    offset_b = jnp.broadcast_to(jnp.reshape(q_offset, -1), (b,))

    def tile(state, i, j):
        position = jnp.minimum(offset_b[:, None] + i * rows + jnp.arange(rows)[None], s - 1)
        seen = (j * cols + jnp.arange(cols))[None, :, None] <= position[:, None]
        new = _weighted(_rows(q, i, rows), _rows(k, j, cols), _rows(v, j, cols), seen[:, None])
        return _merged(state, new, i)

    i, j = (x.reshape(-1) for x in np.indices((q.shape[2] // rows, k.shape[2] // cols)))
    last = offset_b.max() + np.minimum((i + 1) * rows, t) - 1
    pairs, count = _first(np.stack((i, j), axis=1), j * cols <= last)
    return _finished(_over(pairs, count, tile, _nothing(q, v)), t, v.dtype)


State = tuple[
    jax.Array, jax.Array
]  # out float32 [b, h, t, v] of the keys so far, and their log-sum-exp [b, h, t]


def _nothing(q, v) -> State:
    shape = q.shape[:3]
    return jnp.zeros((*shape, v.shape[3]), jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)


def _merged(state: State, new: tuple[jax.Array, jax.Array, jax.Array], i: jax.Array) -> State:
    """The state with what `_weighted` gave for block i of the queries."""
    (out, lse), (o, top, total) = state, new
    before = _rows(lse, i, top.shape[2])
    after = jnp.logaddexp(before, top + jnp.log(total))
    base = jnp.where(after == -jnp.inf, 0, after)
    old, weight = jnp.exp(before - base)[..., None], jnp.exp(top - base)[..., None]
    return _put(out, _rows(out, i, top.shape[2]) * old + o * weight, i), _put(lse, after, i)


def _finished(state: State, t: int, dtype) -> tuple[jax.Array, jax.Array]:
    out, lse = state
    return out[:, :, :t].astype(dtype), jnp.where(lse == -jnp.inf, jnp.inf, lse)[:, :, :t]


# --- backward -------------------------------------------------------------------------------------------------------


def mla_attention_backward(q, k, v, segments, out, lse, dout) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v."""
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    segments = None if segments is None else segments[:, None]
    gradients = _diagonal_gradients if q.shape[2] <= BLOCK else _blockwise_gradients
    dq, dk, dv = gradients(q, k, v, segments, lse, delta, dout)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _blockwise_gradients(q, k, v, segments, lse, delta, do) -> tuple[jax.Array, ...]:
    t, size = q.shape[2], _block_size(q.shape[2])
    q, k, v, delta, do = (_padded(x, size) for x in (q, k, v, delta, do))
    lse = _padded(lse, size, constant_values=jnp.inf)  # queries that are not there have no weights
    segments = None if segments is None else _padded(segments, size, mode="edge")
    n = q.shape[2] // size

    def diagonal(i, sums):
        q_i, k_i, v_i, *rest = (_rows(x, i, size) for x in (q, k, v, lse, delta, do))
        own = None if segments is None else _rows(segments, i, size)
        new = _diagonal_gradients(q_i, k_i, v_i, own, *rest)
        return tuple(_put(x, y, i) for x, y in zip(sums, new, strict=True))

    def tile(sums, i, j):
        seen = None
        if segments is not None:
            seen = _rows(segments, j, size)[..., None] == _rows(segments, i, size)[..., None, :]
        q_i, lse_i, delta_i, do_i = (_rows(x, i, size) for x in (q, lse, delta, do))
        new = _gradients(q_i, _rows(k, j, size), _rows(v, j, size), seen, lse_i, delta_i, do_i)
        return tuple(_plus(x, y, at) for x, y, at in zip(sums, new, (i, j, j), strict=True))

    sums = lax.fori_loop(0, n, diagonal, tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    sums = _over(*_earlier(segments, size, n), tile, sums)
    return tuple(x[:, :, :t] for x in sums)

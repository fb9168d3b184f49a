"""Causal attention: exact softmax attention in query chunks that read only the keys they may see, and the output
projection, which saves the core's output once for both.

The backward pass is written out: it recomputes the probabilities of a chunk from the saved log-sum-exp, so
that no [s, t] array outlives a chunk, and adds each chunk's key and value gradients in place. A CPU multiplies a
left operand that it has to transpose at half the speed: scores are held [t, s] forward, and keys first, [s, t],
backward, where two of three products want them so.

Dims: b batch, h heads, t query token, s key token, k query/key head dim, v value head dim.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.precision.product import product
from deepseek_jax.precision.sums import precision

# A query chunk is a dense product; below this many rows its overhead shows, above it masked work does.
MIN_CHUNK = 64
MAX_CHUNKS = 8


def _chunks(t: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each query chunk: at most MAX_CHUNKS, each of at least MIN_CHUNK rows."""
    step = max(MIN_CHUNK, -(-t // MAX_CHUNKS))
    for start in range(0, t, step):
        yield start, min(start + step, t)


def _seen(segments_bt: jax.Array | None, start: int, end: int) -> jax.Array:
    """Which keys 0..end-1 the queries start..end-1 see: bool, broadcasts against [b, h, s, t]."""
    seen = jnp.arange(end)[:, None] <= jnp.arange(start, end)[None, :]
    if segments_bt is None:
        return seen
    same = segments_bt[:, :end, None] == segments_bt[:, None, start:end]
    return (seen[None] & same)[:, None]


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def attention_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments_bt: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """q [b, h, t, k] scaled, k [b, h, s, k], v [b, h, s, v] -> (output [b, h, t, v], log-sum-exp [b, h, t])."""
    outs, lses = [], []
    for start, end in _chunks(q.shape[2]):
        s = _dot("bhtk,bhsk->bhts", q[:, :, start:end], k[:, :, :end])
        s = jnp.where(_seen(segments_bt, start, end).swapaxes(-1, -2), s, -jnp.inf)
        top = s.max(-1)
        p = jnp.exp(s - top[..., None])
        total = p.sum(-1)
        o = _dot("bhts,bhsv->bhtv", p.astype(v.dtype), v[:, :, :end]) / total[..., None]
        outs.append(o.astype(v.dtype))
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)


def _add_prefix(acc: jax.Array | None, new: jax.Array) -> jax.Array:
    """`acc` with `new` added to its first rows; the first, longest `new` starts it."""
    if acc is None:
        return new
    head = lax.slice_in_dim(acc, 0, new.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(acc, head + new, 0, 2)


def attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments_bt: jax.Array | None,
    o: jax.Array,
    lse: jax.Array,
    do: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, given that of the output."""
    delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1)
    dqs, dk, dv = [], None, None
    for start, end in reversed(list(_chunks(q.shape[2]))):
        q_c, k_c, v_c = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        do_c = do[:, :, start:end]
        s = _dot("bhsk,bhtk->bhst", k_c, q_c) - lse[:, :, None, start:end]
        p = jnp.where(_seen(segments_bt, start, end), jnp.exp(s), 0.0)
        dp = _dot("bhsv,bhtv->bhst", v_c, do_c)
        ds = (p * (dp - delta[:, :, None, start:end])).astype(q.dtype)
        dqs.append(_dot("bhst,bhsk->bhtk", ds, k_c))
        dk = _add_prefix(dk, _dot("bhst,bhtk->bhsk", ds, q_c))
        dv = _add_prefix(dv, _dot("bhst,bhtv->bhsv", p.astype(v.dtype), do_c))
    dq = jnp.concatenate(dqs[::-1], axis=2)
    assert dk is not None and dv is not None
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


# --- with the output projection ---------------------------------------------------------------------------------

# Queries, scaled, and keys [b, h, t, k], values [b, h, t, v].
CoreInputs = tuple[jax.Array, jax.Array, jax.Array]


def core_inputs(q_bthk: jax.Array, k_bshk: jax.Array, v_bshv: jax.Array, scale: float) -> CoreInputs:
    """Heads first, queries times `scale`."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_bthk * jnp.asarray(scale, q_bthk.dtype), k_bshk, v_bshv))
    return q, k, v


class Kept(NamedTuple):
    """What the backward pass of `core_output` needs beside its inputs: outputs of the core [b, t, h, v] as the weight's
    product packs them, log-sum-exp [b, h, t], and the weight. The output is saved once, for the core and for the
    projection (report section 3.3.3)."""

    output: Any
    lse: jax.Array
    wo: Any


def core_output(qkv: CoreInputs, segments_bt: jax.Array | None, wo_hvd: Any) -> jax.Array:
    """softmax(q k^T + mask) v, scores and softmax in float32, times the output projection -> [b, t, d].

    Token t sees tokens s <= t, and only those of its own segment if `segments_bt` (int32) is given. The sum is over the
    heads whose weights there are.
    """
    return _core_output(qkv, segments_bt, product(wo_hvd, n_in=2))


def core_output_forward(qkv: CoreInputs, segments_bt: jax.Array | None, wo: Any) -> tuple[jax.Array, Kept]:
    o, lse = attention_forward(*qkv, segments_bt)
    o_bthv = jnp.swapaxes(o, 1, 2)
    y = wo.fprop(wo.operand(o_bthv), o.dtype)
    kept = Kept(wo.packed_output(o_bthv), lse, wo.kept_for_backward())
    return y.reshape(*o_bthv.shape[:2], -1), kept


def core_output_dgrad(
    qkv: CoreInputs, segments_bt: jax.Array | None, kept: Kept, dy_btd: jax.Array
) -> tuple[CoreInputs, jax.Array]:
    """Gradients of queries, keys and values; and the core's output [b, t, h, v], for `wgrad` of the projection."""
    (q, _, v), (output, lse, wo) = qkv, kept
    b, h, t, _ = q.shape
    o_bthv = wo.unpacked(output, v.dtype).reshape(b, t, h, -1)
    do_bthv = wo.dgrad(dy_btd, dy_btd.dtype).reshape(o_bthv.shape)
    o, do = jnp.swapaxes(o_bthv, 1, 2), jnp.swapaxes(do_bthv, 1, 2)
    return attention_backward(*qkv, segments_bt, o, lse, do), o_bthv


def core_output_backward(
    qkv: CoreInputs, segments_bt: jax.Array | None, kept: Kept, dy_btd: jax.Array
) -> tuple[CoreInputs, Any]:
    """Gradients of the core's inputs and of the weight."""
    d_qkv, o_bthv = core_output_dgrad(qkv, segments_bt, kept, dy_btd)
    return d_qkv, kept.wo.wgrad(o_bthv, dy_btd)


@jax.custom_vjp
def _core_output(qkv, segments_bt, wo):  # type: ignore[no-untyped-def]
    return core_output_forward(qkv, segments_bt, wo)[0]


def _core_output_fwd(qkv, segments_bt, wo):  # type: ignore[no-untyped-def]
    y_btd, kept = core_output_forward(qkv, segments_bt, wo)
    return y_btd, (qkv, segments_bt, kept)


def _core_output_bwd(saved, dy_btd):  # type: ignore[no-untyped-def]
    qkv, segments_bt, kept = saved
    d_qkv, d_wo = core_output_backward(qkv, segments_bt, kept, dy_btd)
    return d_qkv, None, d_wo


_core_output.defvjp(_core_output_fwd, _core_output_bwd)

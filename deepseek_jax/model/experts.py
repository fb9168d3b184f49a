"""Routed experts on one device: dropless, at a cost proportional to the (token, expert) pairs routed.

Pairs ("rows") are sorted by expert. The training form walks over blocks of rows of one expert: each block
gathers its tokens, runs the SwiGLU FFN with that expert's weights and writes a window of the result; a
window's tail may overwrite the next expert's first rows, which the next block then computes, so nothing is
padded and any imbalance costs at most one partial block per expert. The routing weight is applied inside,
between SwiGLU and down-projection, so that results are plain sums over experts (and partial sums can travel
between devices). Decoding, with few tokens, gathers weights or runs all experts densely.

Dims: n token, k selected expert, m sorted row (n * k), d hidden, f expert inner, e expert.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import Params, swiglu
from deepseek_jax.model.params import Param
from deepseek_jax.model.router import expert_counts

MAX_BLOCK = 128
MIN_BLOCK = 16
DENSE_ROWS = 64  # up to this many tokens all experts run densely: weights are read once, work is small


def expert_params(cfg: ModelConfig) -> dict[str, Param]:
    e, d, f = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
    return {
        "w_gate_edf": Param((e, d, f), ("expert", "embed", "expert_mlp")),
        "w_up_edf": Param((e, d, f), ("expert", "embed", "expert_mlp")),
        "w_down_efd": Param((e, f, d), ("expert", "expert_mlp", "embed")),
    }


class Rows(NamedTuple):
    """Sorted rows of a routing. Rows of absent experts (id outside [0, e)) come last, in no group."""

    token_m: jax.Array  # token of each row
    pair_m: jax.Array  # flat (n, k) index of each row
    row_nk: jax.Array  # row of each pair; m for an absent one
    sizes_e: jax.Array  # rows of each expert


def sort_rows(experts_nk: jax.Array, n_experts: int) -> Rows:
    """Stable sort of the (token, expert) pairs by expert; ids outside [0, e) mark absent pairs."""
    n, k = experts_nk.shape
    flat = experts_nk.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < n_experts), flat, n_experts)
    pair_m = jnp.argsort(flat, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(pair_m).at[pair_m].set(jnp.arange(n * k, dtype=jnp.int32))
    row = jnp.where(flat < n_experts, row, n * k)
    return Rows(pair_m // k, pair_m, row.reshape(n, k), expert_counts(flat, n_experts))


def _block_rows(m: int, e: int) -> int:
    """Rows per block: about the mean load, a power of two within [MIN_BLOCK, MAX_BLOCK]."""
    mean = max(1, m // e)
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << (mean - 1).bit_length()))


class Blocks(NamedTuple):
    """Block i holds rows start[i] ... start[i] + live[i] - 1 of expert[i]; only the first `total` exist."""

    expert: jax.Array
    start: jax.Array
    live: jax.Array
    total: jax.Array


def _blocks(sizes_e: jax.Array, m: int, size: int) -> Blocks:
    e = sizes_e.shape[0]
    per_expert = (sizes_e + size - 1) // size
    ends, first_row = jnp.cumsum(per_expert), jnp.cumsum(sizes_e) - sizes_e
    i = jnp.arange(m // size + e, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, i, side="right"), e - 1).astype(jnp.int32)
    nth = i - (ends - per_expert)[expert]
    live = jnp.clip(sizes_e[expert] - nth * size, 0, size)
    return Blocks(expert, first_row[expert] + nth * size, live, ends[-1])


def _window(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _put(x: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), start, 0)


def _add_at(acc: jax.Array, i: jax.Array, value: jax.Array) -> jax.Array:
    old = lax.dynamic_index_in_dim(acc, i, keepdims=False)
    return lax.dynamic_update_index_in_dim(acc, old + value, i, 0)


def _sum_pairs(rows_md: jax.Array, row_nk: jax.Array) -> jax.Array:
    """Sum of each token's rows -> [n, d]; the absent rows' index reads zeros."""
    parts = [rows_md.at[row_nk[:, j]].get(mode="fill", fill_value=0) for j in range(row_nk.shape[1])]
    return functools.reduce(jnp.add, parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(x_nd, weights_nk, rows: Rows, w, size: int):  # type: ignore[no-untyped-def]
    return _blockwise_fwd(x_nd, weights_nk, rows, w, size)[0]


def _blockwise_fwd(x_nd, weights_nk, rows, w, size):  # type: ignore[no-untyped-def]
    w_gate, w_up, w_down = w
    m, dtype = rows.token_m.shape[0], x_nd.dtype
    blocks = _blocks(rows.sizes_e, m, size)
    token_m = jnp.pad(rows.token_m, (0, size))
    gain_m = jnp.pad(weights_nk.reshape(-1)[rows.pair_m], (0, size)).astype(dtype)

    def body(i, carry):
        y, gate, up = carry
        e, start = blocks.expert[i], blocks.start[i]
        x = x_nd[_window(token_m, start, size)]
        g, u = x @ w_gate[e].astype(dtype), x @ w_up[e].astype(dtype)
        out = (swiglu(g, u) * _window(gain_m, start, size)[:, None]) @ w_down[e].astype(dtype)
        return _put(y, out, start), _put(gate, g, start), _put(up, u, start)

    def empty(width):
        return jnp.zeros((m + size, width), dtype)

    f = w_gate.shape[-1]
    y, gate, up = lax.fori_loop(0, blocks.total, body, (empty(x_nd.shape[1]), empty(f), empty(f)))
    out = _sum_pairs(y[:m], rows.row_nk)
    return out, (x_nd, gain_m, token_m, gate, up, rows, w, weights_nk)


def _blockwise_bwd(size, saved, dy_nd):  # type: ignore[no-untyped-def]
    x_nd, gain_m, token_m, gate, up, rows, (w_gate, w_up, w_down), weights_nk = saved
    m, dtype = rows.token_m.shape[0], x_nd.dtype
    blocks = _blocks(rows.sizes_e, m, size)

    def body(i, carry):
        dx, dgain, dw_gate, dw_up, dw_down = carry
        e, start = blocks.expert[i], blocks.start[i]
        token = _window(token_m, start, size)
        live = (jnp.arange(size) < blocks.live[i])[:, None]
        x, dy = x_nd[token], jnp.where(live, dy_nd[token], 0)
        g, u, gain = (
            _window(gate, start, size),
            _window(up, start, size),
            _window(gain_m, start, size)[:, None],
        )
        sig = jax.nn.sigmoid(g)
        silu = g * sig
        act = silu * u
        dact = dy @ w_down[e].astype(dtype).T
        dg, du = dact * gain * u * (sig + silu * (1 - sig)), dact * gain * silu
        dx_block = dg @ w_gate[e].astype(dtype).T + du @ w_up[e].astype(dtype).T
        return (
            _put(dx, dx_block, start),
            _put(dgain, (dact * act).sum(-1), start),
            _add_at(dw_gate, e, x.T @ dg),
            _add_at(dw_up, e, x.T @ du),
            _add_at(dw_down, e, (act * gain).T @ dy),
        )

    init = (
        jnp.zeros((m + size, x_nd.shape[1]), dtype),
        jnp.zeros((m + size,), weights_nk.dtype),
        *(jnp.zeros(w.shape, jnp.float32) for w in (w_gate, w_up, w_down)),
    )
    dx, dgain, dw_gate, dw_up, dw_down = lax.fori_loop(0, blocks.total, body, init)
    dweights = dgain.at[rows.row_nk].get(mode="fill", fill_value=0)
    dw = tuple(g.astype(w.dtype) for g, w in ((dw_gate, w_gate), (dw_up, w_up), (dw_down, w_down)))
    return _sum_pairs(dx[:m], rows.row_nk), dweights, None, dw


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


def _gathered(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """One copy of each selected expert's weights per pair: for fewer pairs than experts (decoding)."""
    w_gate, w_up, w_down = (
        p[name][experts_nk].astype(x_nd.dtype) for name in ("w_gate_edf", "w_up_edf", "w_down_efd")
    )
    act = swiglu(jnp.einsum("nd,nkdf->nkf", x_nd, w_gate), jnp.einsum("nd,nkdf->nkf", x_nd, w_up))
    return jnp.einsum("nkf,nkfd->nd", act * weights_nk[..., None].astype(x_nd.dtype), w_down)


def _dense(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """All experts for all tokens, weighted by gates that are mostly zero: for batched decoding.

    The product is batched over experts, so the weights are read where they are.
    """
    w_gate, w_up, w_down = (p[name].astype(x_nd.dtype) for name in ("w_gate_edf", "w_up_edf", "w_down_efd"))
    e = w_gate.shape[0]
    gate_ne = (
        jax.nn.one_hot(experts_nk, e, dtype=x_nd.dtype) * weights_nk[..., None].astype(x_nd.dtype)
    ).sum(1)
    x_end = jnp.broadcast_to(x_nd, (e, *x_nd.shape))
    act = swiglu(jnp.einsum("end,edf->enf", x_end, w_gate), jnp.einsum("end,edf->enf", x_end, w_up))
    return jnp.einsum("enf,efd->end", act * gate_ne.T[..., None], w_down).sum(0)


def routed_experts(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """sum_k weights_nk * FFN_{experts_nk}(x_n) -> [n, d]: the training form, differentiable, dropless.

    x_nd in the compute dtype; experts_nk int32, an id outside [0, e) marks an absent pair; weights_nk float32.
    """
    rows = sort_rows(experts_nk, p["w_gate_edf"].shape[0])
    size = _block_rows(experts_nk.size, p["w_gate_edf"].shape[0])
    w = (p["w_gate_edf"], p["w_up_edf"], p["w_down_efd"])
    return _blockwise(x_nd, weights_nk, rows, w, size)


def decode_experts(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """The same function for few tokens; picks the form by the number of pairs. All ids must be present."""
    n_experts = p["w_gate_edf"].shape[0]
    if experts_nk.size < n_experts:
        return _gathered(p, x_nd, experts_nk, weights_nk)
    if x_nd.shape[0] <= DENSE_ROWS:
        return _dense(p, x_nd, experts_nk, weights_nk)
    return routed_experts(p, x_nd, experts_nk, weights_nk)

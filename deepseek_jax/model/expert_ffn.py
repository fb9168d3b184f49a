"""The SwiGLU FFN of every expert over its sorted rows, forward and backward, in two implementations.

`blockwise` walks over blocks of rows of one expert: any imbalance costs at most one partial block per expert, and a
CPU reads each weight where it is. `grouped` is a few grouped GEMMs over all rows (`pallas_kernels.grouped_gemm`),
for GPUs. Which one runs is decided when the program is lowered. The routing weight (gain) is applied inside,
between SwiGLU and down-projection, so that results are plain sums over experts.

Dims: n token, m row (`rows.py`), d hidden, f expert inner, e expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.rows import ALIGNMENT, Rows
from deepseek_jax.model.sums import precision
from deepseek_jax.model.swiglu import swiglu, swiglu_gradients
from pallas_kernels.grouped_gemm.ops import grouped_gemm, grouped_wgrad
from pallas_kernels.groups import aligned_sizes

MIN_BLOCK = 16

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate [e, d, f], up [e, d, f], down [e, f, d]


# --- a loop over blocks -----------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """Block i holds rows start[i] ... start[i] + live[i] - 1 of expert[i]; only the first `total` exist."""

    expert: jax.Array
    start: jax.Array
    live: jax.Array
    total: jax.Array


def _block_rows(m: int, e: int) -> int:
    """Rows per block: about the mean load, a power of two within [MIN_BLOCK, ALIGNMENT]."""
    mean = max(1, m // e)
    return min(ALIGNMENT, max(MIN_BLOCK, 1 << (mean - 1).bit_length()))


def _blocks(rows: Rows, size: int) -> _Blocks:
    e, m = rows.sizes_e.shape[0], rows.token_m.shape[0]
    per_expert = (rows.sizes_e + size - 1) // size
    aligned = aligned_sizes(rows.sizes_e, ALIGNMENT)
    ends, first_row = jnp.cumsum(per_expert), jnp.cumsum(aligned) - aligned
    i = jnp.arange(m // size + e, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, i, side="right", method="compare_all"), e - 1).astype(
        jnp.int32
    )
    nth = i - (ends - per_expert)[expert]
    live = jnp.clip(rows.sizes_e[expert] - nth * size, 0, size)
    return _Blocks(expert, first_row[expert] + nth * size, live, ends[-1])


def _window(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _put(x: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), start, 0)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, float32."""
    return jnp.matmul(a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _add_at(acc: jax.Array, i: jax.Array, value: jax.Array) -> jax.Array:
    old = lax.dynamic_index_in_dim(acc, i, keepdims=False)
    return lax.dynamic_update_index_in_dim(acc, old + value, i, 0)


def blockwise_forward(x_nd: jax.Array, rows: Rows, w: Weights) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y [m, d], gate [m, f], up [m, f]); what padding rows hold is unspecified."""
    w_gate, w_up, w_down = w
    m, dtype = rows.token_m.shape[0], x_nd.dtype
    size = _block_rows(rows.row_nk.size, w_gate.shape[0])
    blocks, gain_m = _blocks(rows, size), rows.gain_m.astype(dtype)

    def body(i, carry):
        y, gate, up = carry
        e, start = blocks.expert[i], blocks.start[i]
        x = x_nd[_window(rows.token_m, start, size)]
        g, u = (_dot(x, part[e].astype(dtype)).astype(dtype) for part in (w_gate, w_up))
        out = _dot(swiglu(g, u) * _window(gain_m, start, size)[:, None], w_down[e].astype(dtype))
        return _put(y, out, start), _put(gate, g, start), _put(up, u, start)

    def empty(width):
        return jnp.zeros((m, width), dtype)

    f = w_gate.shape[-1]
    return lax.fori_loop(0, blocks.total, body, (empty(x_nd.shape[1]), empty(f), empty(f)))


def blockwise_backward(
    x_nd: jax.Array, dy_nd: jax.Array, gate_mf: jax.Array, up_mf: jax.Array, rows: Rows, w: Weights
) -> tuple[jax.Array, jax.Array, Weights]:
    """(dx [m, d], gradient of the gains [m], float32 gradients of the weights)."""
    w_gate, w_up, w_down = w
    m, dtype = rows.token_m.shape[0], x_nd.dtype
    size = _block_rows(rows.row_nk.size, w_gate.shape[0])
    blocks, gain_m = _blocks(rows, size), rows.gain_m.astype(dtype)

    def body(i, carry):
        dx, dgain, dw_gate, dw_up, dw_down = carry
        e, start = blocks.expert[i], blocks.start[i]
        token = _window(rows.token_m, start, size)
        live = (jnp.arange(size) < blocks.live[i])[:, None]
        x, dy = x_nd[token], jnp.where(live, dy_nd[token], 0)
        g, u = _window(gate_mf, start, size), _window(up_mf, start, size)
        gain = _window(gain_m, start, size)[:, None]
        dact = _dot(dy, w_down[e].astype(dtype).T).astype(dtype)
        act, dg, du = swiglu_gradients(g, u, dact * gain)
        dx_block = _dot(dg, w_gate[e].astype(dtype).T) + _dot(du, w_up[e].astype(dtype).T)
        return (
            _put(dx, dx_block, start),
            _put(dgain, (dact.astype(jnp.float32) * act).sum(-1), start),
            _add_at(dw_gate, e, _dot(x.T, dg)),
            _add_at(dw_up, e, _dot(x.T, du)),
            _add_at(dw_down, e, _dot((act * gain).T, dy)),
        )

    init = (
        jnp.zeros((m, x_nd.shape[1]), dtype),
        jnp.zeros((m,), rows.gain_m.dtype),
        *(jnp.zeros(w.shape, jnp.float32) for w in (w_gate, w_up, w_down)),
    )
    dx, dgain, *dw = lax.fori_loop(0, blocks.total, body, init)
    return dx, dgain, tuple(dw)


# --- grouped GEMMs ----------------------------------------------------------------------------------------


def grouped_forward(x_nd: jax.Array, rows: Rows, w: Weights) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`blockwise_forward` on all rows at once; padding rows of y are zero."""
    w_gate, w_up, w_down = (x.astype(x_nd.dtype) for x in w)
    x_md = x_nd[rows.token_m]

    def product(a, b):
        return grouped_gemm(a, b, rows.group_m, transpose_b=False, alignment=ALIGNMENT)

    gate, up = product(x_md, w_gate), product(x_md, w_up)
    act = swiglu(gate, up) * rows.gain_m[:, None].astype(x_nd.dtype)
    return product(act, w_down), gate, up


def grouped_backward(
    x_nd: jax.Array, dy_nd: jax.Array, gate_mf: jax.Array, up_mf: jax.Array, rows: Rows, w: Weights
) -> tuple[jax.Array, jax.Array, Weights]:
    """`blockwise_backward` on all rows at once."""
    w_gate, w_up, w_down = (x.astype(x_nd.dtype) for x in w)
    dy_md = jnp.where(rows.real_m1, dy_nd[rows.token_m], 0)
    x_md, gain_m1 = x_nd[rows.token_m], rows.gain_m[:, None].astype(x_nd.dtype)

    def product(a, b):
        return grouped_gemm(a, b, rows.group_m, transpose_b=True, alignment=ALIGNMENT)

    def wgrad(a, b):
        return grouped_wgrad(a, b, aligned_sizes(rows.sizes_e, ALIGNMENT), alignment=ALIGNMENT)

    dact = product(dy_md, w_down)
    act, dg, du = swiglu_gradients(gate_mf, up_mf, dact * gain_m1)
    dg, du = (jnp.where(rows.real_m1, x, 0) for x in (dg, du))
    dw = (wgrad(x_md, dg), wgrad(x_md, du), wgrad(act * gain_m1, dy_md))
    dgain = (dact.astype(jnp.float32) * act).sum(-1)
    # One product of both depths: their sum stays in the float32 accumulator.
    both = (jnp.concatenate(x, axis=-1) for x in ((dg, du), (w_gate, w_up)))
    return product(*both), dgain, dw


# --- by platform ------------------------------------------------------------------------------------------


def forward(*args: Any) -> Any:
    return lax.platform_dependent(*args, cuda=grouped_forward, default=blockwise_forward)


def backward(*args: Any) -> Any:
    return lax.platform_dependent(*args, cuda=grouped_backward, default=blockwise_backward)

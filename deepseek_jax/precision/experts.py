"""Routed experts in FP8: the grouped GEMMs of fprop, dgrad and wgrad over sorted rows (report section 3.3).

The input is quantised per token before it is copied to its experts' rows, with power-of-two scales, and so is the
gradient of the output: these are the tensors that travel between devices. Saved for the backward pass are the input
and the SwiGLU inputs, in FP8; the SwiGLU output is computed again.

Dims: n token, k selected expert, m row (`model/rows.py`), d hidden, f expert inner, e expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.rows import ALIGNMENT, Rows, sort_rows, sum_pairs
from deepseek_jax.model.swiglu import swiglu_gradients
from deepseek_jax.precision.linear import (
    Weight,
    saved_weight,
    swiglu_operand,
    weight_gradient,
)
from deepseek_jax.precision.operands import (
    Format,
    Operand,
    dequantise,
    keep,
    quantise,
    quantise_transposed,
    requantise_transposed,
    restore,
    row_scales,
    summed,
)
from deepseek_jax.precision.policy import Formats, Policy
from pallas_kernels.fp8_grouped_gemm.ops import fp8_grouped_gemm, fp8_grouped_wgrad
from pallas_kernels.grouped_gemm.ops import grouped_gemm, grouped_wgrad
from pallas_kernels.groups import aligned_sizes


def _to_rows(x: Operand, fmt: Format, rows: Rows) -> Operand:
    """Operand of tokens -> operand of sorted rows; padding rows are zero."""
    q = jnp.where(rows.real_m1, x.q[rows.token_m], jnp.zeros((), x.q.dtype))
    return Operand(q, x.scale if fmt.rows is None else row_scales(x, fmt)[rows.token_m])


def _product(a: Operand, b: Operand, formats: Formats, rows: Rows, dtype) -> jax.Array:
    """Each row of a [m, depth] times its expert's b [e, out, depth] -> [m, out]; zero in padding rows."""
    if formats[0].fine:
        scale = row_scales(a, formats[0])
        return fp8_grouped_gemm(a.q, scale, *b, rows.group_m, out_dtype=dtype, alignment=ALIGNMENT)
    a_q, b_q = a.q.astype(jnp.float32), b.q.astype(jnp.float32)
    product = grouped_gemm(a_q, b_q, rows.group_m, alignment=ALIGNMENT)
    b_scale = jnp.swapaxes(b.scale, -1, -2)[jnp.maximum(rows.group_m, 0), 0]
    return (product * (a.scale * b_scale)).astype(dtype)


def _wgrad(a: Operand, b: Operand, formats: Formats, rows: Rows) -> jax.Array:
    """a [in, m], b [out, m] -> a @ b.T over each expert's rows [e, in, out], float32."""
    sizes = aligned_sizes(rows.sizes_e, ALIGNMENT)
    if formats[0].fine:
        return fp8_grouped_wgrad(a.q, row_scales(a, formats[0]), b.q, row_scales(b, formats[1]), sizes)
    a_q, b_q = a.q.astype(jnp.float32).T, b.q.astype(jnp.float32).T
    return grouped_wgrad(a_q, b_q, sizes, alignment=ALIGNMENT) * (a.scale * b.scale.T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(policy: Policy, x_nd, weights_nk, experts_nk, w, came):  # type: ignore[no-untyped-def]
    return _experts_fwd(policy, x_nd, weights_nk, experts_nk, w, came)[0]


def _experts_fwd(policy: Policy, x_nd, weights_nk, experts_nk, w, came):  # type: ignore[no-untyped-def]
    gate_w, up_w, down_w = (part[1] for part in w)
    rows = sort_rows(experts_nk, weights_nk, gate_w.q.shape[0])
    dtype, fmt, formats = x_nd.dtype, policy.expert_input, (policy.expert_input, policy.fprop[1])
    x = quantise(x_nd, fmt) if came is None else Operand(*came)
    x_rows = _to_rows(x, fmt, rows)
    gate, up = (_product(x_rows, part, formats, rows, dtype) for part in (gate_w, up_w))
    act = swiglu_operand(gate, up, rows.gain_m, policy.fprop[0])
    y_md = _product(act, down_w, policy.fprop, rows, dtype)
    kept = (keep(part) for part in (x, quantise(gate, policy.fprop[0]), quantise(up, policy.fprop[0])))
    return sum_pairs(y_md, rows.row_nk), (*kept, rows, *map(saved_weight, w))


def _experts_bwd(policy: Policy, saved: Any, dy_nd: jax.Array) -> Any:
    *kept, rows, gate_w, up_w, down_w = saved
    x, gate, up = map(restore, kept)
    dtype, fmt, tokens = dy_nd.dtype, policy.expert_input, policy.wgrad[0]
    gradient = fmt if policy.dgrad[0].rows == fmt.rows else policy.dgrad[0]
    dy = _to_rows(quantise(dy_nd, gradient), gradient, rows)
    # A row's own scale now: blocks of tokens end at the copy to rows.
    by_row = Format(1, gradient.depth, gradient.scale) if gradient.rows else gradient
    dact = _product(dy, down_w[1], (by_row, policy.dgrad[1]), rows, jnp.float32)
    gain_m1 = rows.gain_m[:, None]
    gate_mf, up_mf = (dequantise(part, policy.fprop[0]) for part in (gate, up))
    act, d_gate, d_up = swiglu_gradients(gate_mf, up_mf, dact * gain_m1)
    d_gate, d_up = d_gate.astype(dtype), d_up.astype(dtype)
    act_t = quantise_transposed((act * gain_m1).astype(dtype), tokens)
    dy_t = requantise_transposed(dy, by_row, policy.wgrad[1])
    x_t = requantise_transposed(_to_rows(x, fmt, rows), fmt, tokens)
    d_gate_t, d_up_t = (quantise_transposed(g, policy.wgrad[1]) for g in (d_gate, d_up))
    dw = [_wgrad(a, b, policy.wgrad, rows) for a, b in ((x_t, d_gate_t), (x_t, d_up_t), (act_t, dy_t))]
    dx_md = summed(
        lambda a, b, out: _product(a, b, policy.dgrad, rows, out),
        (quantise(d_gate, policy.dgrad[0]), gate_w[1]),
        (quantise(d_up, policy.dgrad[0]), up_w[1]),
        policy.dgrad[0],
        dtype,
    )
    dgain_m = (dact * act).sum(-1)
    dweights = dgain_m.at[rows.row_nk].get(mode="fill", fill_value=0)
    return (
        sum_pairs(dx_md, rows.row_nk),
        dweights,
        None,
        tuple(map(weight_gradient, dw, (gate_w, up_w, down_w))),
        None,
    )


_experts.defvjp(_experts_fwd, _experts_bwd)


def routed_experts(
    x_nd: jax.Array,
    experts_nk: jax.Array,
    weights_nk: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
    came: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """`model.experts.routed_experts` by the weights' policy; masters [e, d, f], [e, d, f], [e, f, d].

    `came`: the tokens as `policy.expert_input` has them, where they came so; `x_nd` is then not read.
    """
    w = tuple((part.master, part.fprop, part.dgrad) for part in (gate, up, down))
    return _experts(gate.policy, x_nd, weights_nk, experts_nk, w, came)

"""Attention core and output projection together, so that the attention output is saved once, in E5M6.

Both the backward pass of the core and the weight gradient of the projection read it (report section 3.3.3).

Dims: b batch, h heads, t query token, s key token, k query/key head dim, v value head dim, d hidden.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.attention import attention_backward, attention_forward
from deepseek_jax.precision import e5m6
from deepseek_jax.precision.linear import Matrix, Weight, dgrad, matrix, saved_weight, weight_gradient, wgrad
from deepseek_jax.precision.operands import (
    Operand,
    dequantise,
    gemm,
    keep,
    quantise,
    quantise_transposed,
    restore,
)
from deepseek_jax.precision.policy import Policy


def _tokens(o_bhtv: jax.Array) -> jax.Array:
    """[b, h, t, v] -> [b * t, h * v]."""
    b, h, t, v = o_bhtv.shape
    return jnp.swapaxes(o_bhtv, 1, 2).reshape(b * t, h * v)


def _heads(o: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    b, h, t, v = shape
    return jnp.swapaxes(o.reshape(b, t, h, v), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _projected(policy: Policy, q, k, v, segments_bt, w: Matrix) -> jax.Array:  # type: ignore[no-untyped-def]
    return _projected_fwd(policy, q, k, v, segments_bt, w)[0]


def _projected_fwd(policy: Policy, q, k, v, segments_bt, w: Matrix) -> tuple[jax.Array, Any]:  # type: ignore[no-untyped-def]
    o_bhtv, lse = attention_forward(q, k, v, segments_bt)
    o = _tokens(o_bhtv)
    operand = quantise(o, policy.fprop[0])
    kept = e5m6.encode(o) if policy.saved_attention == "e5m6" else keep(operand)
    return gemm(operand, w[1], policy.fprop, o.dtype), (q, k, v, segments_bt, lse, kept, saved_weight(w))


def _projected_bwd(policy: Policy, saved: Any, dy_md: jax.Array) -> Any:
    q, k, v, segments_bt, lse, kept, w = saved
    shape = (*q.shape[:3], v.shape[-1])
    if isinstance(kept, Operand):
        o = dequantise(restore(kept), policy.fprop[0], v.dtype)
    else:
        o = e5m6.decode(kept, shape[1] * shape[3], v.dtype)
    do = dgrad(policy, dy_md, w[1])
    dw = wgrad(policy, quantise_transposed(o, policy.wgrad[0]), dy_md)
    dq, dk, dv = attention_backward(q, k, v, segments_bt, _heads(o, shape), lse, _heads(do, shape))
    return dq, dk, dv, None, weight_gradient(dw, w)


_projected.defvjp(_projected_fwd, _projected_bwd)


def projected_attention(
    q_bthk: jax.Array,
    k_bshk: jax.Array,
    v_bshv: jax.Array,
    scale: float,
    segments_bt: jax.Array | None,
    w: Weight,
) -> jax.Array:
    """`model.attention.causal_attention` and the output projection w (master [h, v, d]) -> [b, t, d]."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_bthk * jnp.asarray(scale, q_bthk.dtype), k_bshk, v_bshv))
    y = _projected(w.policy, q, k, v, segments_bt, matrix(w, n_in=2))
    return y.reshape(*q_bthk.shape[:2], -1)

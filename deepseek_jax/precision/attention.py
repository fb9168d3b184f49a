"""Attention core and output projection together, so that the attention output is saved once, in E5M6.

Both the backward pass of the core and the weight gradient of the projection read it (report section 3.3.3).

Dims: b batch, h heads, t query token, s key token, k query/key head dim, v value head dim, d hidden.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.attention import CoreInputs, attention_backward, attention_forward
from deepseek_jax.precision import e5m6
from deepseek_jax.precision.linear import Weight, dgrad, wgrad
from deepseek_jax.precision.operands import (
    Operand,
    dequantise,
    gemm,
    keep,
    quantise,
    quantise_transposed,
    restore,
)


def _tokens(o_bhtv: jax.Array) -> jax.Array:
    """[b, h, t, v] -> [b * t, h * v]."""
    b, h, t, v = o_bhtv.shape
    return jnp.swapaxes(o_bhtv, 1, 2).reshape(b * t, h * v)


def _heads(o: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    b, h, t, v = shape
    return jnp.swapaxes(o.reshape(b, t, h, v), 1, 2)


_NONE: Any = None  # an operand that is not kept, or has no gradient
# The output in the policy's format, the log-sum-exp [b, h, t], and of the weight the operand of dgrad.
Kept = tuple[Any, jax.Array, Weight]


def forward(qkv: CoreInputs, segments_bt: jax.Array | None, wo: Weight) -> tuple[jax.Array, Kept]:
    """`model.attention.forward` under the policy of the weight (master [h, v, d])."""
    policy = wo.policy
    o_bhtv, lse = attention_forward(*qkv, segments_bt)
    o = _tokens(o_bhtv)
    operand = quantise(o, policy.fprop[0])
    y = gemm(operand, wo.fprop, policy.fprop, o.dtype)
    b, _, t, _ = o_bhtv.shape
    output = e5m6.encode(o) if policy.saved_attention == "e5m6" else keep(operand)
    read = dataclasses.replace(wo, master=jnp.zeros((0,), wo.master.dtype), fprop=_NONE)
    return y.reshape(b, t, -1), (output, lse, read)


def backward(
    qkv: CoreInputs, segments_bt: jax.Array | None, kept: Kept, dy_btd: jax.Array
) -> tuple[CoreInputs, Weight]:
    """`model.attention.backward`; of the weight, the master takes the gradient."""
    (q, _, v), (output, lse, wo) = qkv, kept
    policy = wo.policy
    shape = (*q.shape[:3], v.shape[-1])
    if isinstance(output, Operand):
        o = dequantise(restore(output), policy.fprop[0], v.dtype)
    else:
        o = e5m6.decode(output, shape[1] * shape[3], v.dtype)
    dy_md = dy_btd.reshape(-1, dy_btd.shape[-1])
    do = dgrad(policy, dy_md, wo.dgrad)
    dw = wgrad(policy, quantise_transposed(o, policy.wgrad[0]), dy_md)
    d_qkv = attention_backward(*qkv, segments_bt, _heads(o, shape), lse, _heads(do, shape))
    master = dw.reshape(shape[1], shape[3], -1).astype(wo.master.dtype)
    return d_qkv, dataclasses.replace(wo, master=master, fprop=_NONE, dgrad=_NONE)

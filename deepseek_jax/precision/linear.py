"""The quantised linear layer, the SwiGLU FFN and the attention output projection: forward and backward.

A policy travels with the weight: `attach` wraps the weights of linear layers as `Weight`, and `model.layers.linear`
sends a `Weight` here. Weights are quantised once per step, outside the loop over micro-batches. Each GEMM's operands
are quantised on their own: the activation saved in FP8 by the forward pass is dequantised, transposed and quantised
again along the tokens for the weight gradient.

Dims: m token, k input channel, n output channel, f FFN inner.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.model.swiglu import SWIGLU_INPUTS, swiglu, swiglu_gradients
from deepseek_jax.precision.operands import (
    Format,
    Operand,
    dequantise,
    gemm,
    keep,
    quantise,
    quantise_transposed,
    requantise_transposed,
    restore,
    summed,
    transpose,
)
from deepseek_jax.precision.policy import Policy
from pallas_kernels.quantize.ops import swiglu_quantize


@flax.struct.dataclass
class Weight:
    """The weight of a linear layer with its two quantised operands, leading layer and expert dims allowed.

    master: float32, in the shape of the parameter; it takes the gradient and is not read.
    fprop: [..., out, in]; dgrad: [..., in, out].
    """

    master: jax.Array
    fprop: Operand
    dgrad: Operand
    policy: Policy = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.master.shape

    def multiply(self, x: jax.Array, n_in: int = 1) -> jax.Array:
        """Contract the last `n_in` dims of x with the first `n_in` of the weight."""
        batch, out = x.shape[: x.ndim - n_in], self.shape[n_in:]
        flat = x.reshape(math.prod(batch), -1)
        return _linear(self.policy, flat, matrix(self, n_in)).reshape(*batch, *out)


def quantise_weight(
    w: jax.Array, policy: Policy, quantise: Callable[[jax.Array, Format], Operand] = quantise
) -> tuple[Operand, Operand]:
    """w [..., in, out] -> operands of fprop and dgrad. `quantise`: of a part of w, if that is what there is."""
    fprop, dgrad = policy.fprop[1], policy.dgrad[1]
    in_out = quantise(w, dgrad)
    same = fprop == dgrad and fprop.square
    return transpose(in_out if same else quantise(w, fprop.transposed)), in_out


# --- the three GEMMs --------------------------------------------------------------------------------------


def wgrad(policy: Policy, x: Operand, dy_mn: jax.Array) -> jax.Array:
    """x^T dy [k, n], float32: operands in 128x1 tiles, `x` already transposed."""
    return gemm(x, quantise_transposed(dy_mn, policy.wgrad[1]), policy.wgrad, jnp.float32)


def dgrad(policy: Policy, dy_mn: jax.Array, w: Operand) -> jax.Array:
    """dy W^T [m, k] in the dtype of dy."""
    return gemm(quantise(dy_mn, policy.dgrad[0]), w, policy.dgrad, dy_mn.dtype)


# What a linear layer reads of its weight: (master [in, out], fprop, dgrad).
Matrix = tuple[jax.Array, Operand, Operand]
Saved = tuple[jax.Array, Operand]  # of a Matrix: an empty array of the master's dtype, and the dgrad operand


def saved_weight(w: Matrix) -> Saved:
    """What the backward pass needs of a weight: not the master, not the operand of fprop."""
    return jnp.zeros((0,), w[0].dtype), w[2]


def weight_gradient(dw: jax.Array, w: Saved) -> Any:
    """Cotangent of a Matrix: the master takes it all."""
    return dw.astype(w[0].dtype), None, None


def matrix(w: Weight, n_in: int = 1) -> Matrix:
    """The weight of one layer as a matrix [in, out]: the first `n_in` dims are the input."""
    return w.master.reshape(math.prod(w.shape[:n_in]), -1), w.fprop, w.dgrad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(policy: Policy, x_mk: jax.Array, w: Matrix) -> jax.Array:
    return _linear_fwd(policy, x_mk, w)[0]


def _linear_fwd(policy: Policy, x_mk: jax.Array, w: Matrix) -> tuple[jax.Array, Any]:
    x = quantise(x_mk, policy.fprop[0])
    return gemm(x, w[1], policy.fprop, x_mk.dtype), (keep(x), saved_weight(w))


def _linear_bwd(policy: Policy, saved: Any, dy_mn: jax.Array) -> Any:
    x, w = saved
    x_t = requantise_transposed(restore(x), policy.fprop[0], policy.wgrad[0])
    return dgrad(policy, dy_mn, w[1]), weight_gradient(wgrad(policy, x_t, dy_mn), w)


_linear.defvjp(_linear_fwd, _linear_bwd)


# --- SwiGLU FFN -------------------------------------------------------------------------------------------


def swiglu_operand(gate: jax.Array, up: jax.Array, gain_m: jax.Array | None, fmt: Format) -> Operand:
    """silu(gate) * up (* gain) as the operand of the down-projection, in one pass where the format allows."""
    if fmt.fine and fmt.rows == 1:
        return Operand(*swiglu_quantize(gate, up, gain_m, fmt.scale))
    act = swiglu(gate.astype(jnp.float32), up.astype(jnp.float32))
    return quantise(act if gain_m is None else act * gain_m[:, None], fmt)


Matrices = tuple[Matrix, Matrix, Matrix]  # gate, up, down


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(policy: Policy, x_mk: jax.Array, w: Matrices) -> jax.Array:
    return _mlp_fwd(policy, x_mk, w)[0]


def _mlp_fwd(policy: Policy, x_mk: jax.Array, w: Matrices) -> tuple[jax.Array, Any]:
    fmt, dtype = policy.fprop[0], x_mk.dtype
    x = quantise(x_mk, fmt)
    gate, up = (gemm(x, part[1], policy.fprop, dtype) for part in w[:2])
    act = swiglu_operand(gate, up, None, fmt)
    y = gemm(act, w[2][1], policy.fprop, dtype)
    kept = checkpoint_name(tuple(keep(quantise(part, fmt)) for part in (gate, up)), SWIGLU_INPUTS)
    return y, (keep(x), *kept, *map(saved_weight, w))


def _mlp_bwd(policy: Policy, saved: Any, dy_mk: jax.Array) -> Any:
    """The SwiGLU inputs come back from FP8 and its output is computed again (section 3.3.3)."""
    *kept, gate_w, up_w, down_w = saved
    x, gate, up = map(restore, kept)
    fmt, dtype = policy.fprop[0], dy_mk.dtype
    act, d_gate, d_up = swiglu_gradients(
        dequantise(gate, fmt), dequantise(up, fmt), dgrad(policy, dy_mk, down_w[1])
    )
    d_gate, d_up = d_gate.astype(dtype), d_up.astype(dtype)
    x_t = requantise_transposed(x, fmt, policy.wgrad[0])
    act_t = quantise_transposed(act.astype(dtype), policy.wgrad[0])
    dw = (wgrad(policy, x_t, d_gate), wgrad(policy, x_t, d_up), wgrad(policy, act_t, dy_mk))
    gradient = policy.dgrad[0]
    dx = summed(
        lambda a, b, out: gemm(a, b, policy.dgrad, out),
        (quantise(d_gate, gradient), gate_w[1]),
        (quantise(d_up, gradient), up_w[1]),
        gradient,
        dtype,
    )
    return dx, tuple(map(weight_gradient, dw, (gate_w, up_w, down_w)))


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


def mlp(x: jax.Array, gate: Weight, up: Weight, down: Weight) -> jax.Array:
    """down(silu(gate x) * up x): [..., d] -> [..., d], saving its input and the SwiGLU's inputs in FP8."""
    flat = x.reshape(-1, x.shape[-1])
    return _mlp(gate.policy, flat, (matrix(gate), matrix(up), matrix(down))).reshape(x.shape)

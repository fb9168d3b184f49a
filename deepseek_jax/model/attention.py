"""Attention core and output projection, which saves the core's output once for both.

The core is `pallas_kernels/mla_attention`: causal softmax attention with memory linear in the tokens, whose backward pass
recomputes the weights from the output's log-sum-exp.

Dims: b batch, h heads, t query token, s key token, k query/key head dim, v value head dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.precision.product import product
from pallas_kernels.mla_attention.ops import mla_attention, mla_attention_backward

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


def core_output_forward(
    qkv: CoreInputs, segments_bt: jax.Array | None, wo: Any, q_offset: jax.Array | None = None
) -> tuple[jax.Array, Kept]:
    """q_offset: see `mla_attention`."""
    o, lse = mla_attention(*qkv, segments_bt, q_offset)
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
    return mla_attention_backward(*qkv, segments_bt, o, lse, do), o_bthv


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

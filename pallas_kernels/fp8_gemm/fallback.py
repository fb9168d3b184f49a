"""Runs the FP8 GEMM in XLA and adds up in DeepSeek's order: 128-deep products, each scaled and promoted to float32."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import BLOCK, pad_last2


def k_major_blocks(x: jax.Array) -> jax.Array:
    """[M, K] -> [ceil(K/128), M, 128]: the blocks of the contraction leading."""
    x = pad_last2(x, (1, BLOCK))
    return x.reshape(x.shape[0], -1, BLOCK).swapaxes(0, 1)


def row_scales(scale: jax.Array, rows: int) -> jax.Array:
    """Scales per row or per 128 rows -> [ceil(K/128), rows]."""
    per_row = scale if scale.shape[0] == rows else jnp.repeat(scale, BLOCK, axis=0)[:rows]
    return per_row.T


def scaled_product(a, b, a_scale, b_scale) -> jax.Array:
    """One promoted step: [M, 128] x [N, 128] -> [M, N] float32, times one scale per row of each."""
    product = lax.dot_general(
        a.astype(jnp.float32), b.astype(jnp.float32), (((1,), (1,)), ((), ())), precision="highest"
    )
    return product * (a_scale[:, None] * b_scale[None, :])


def fp8_gemm(a, a_scale, b, b_scale, accumulate=None, *, out_dtype=jnp.float32) -> jax.Array:
    """a [M, K], b [N, K] -> [M, N]; a scan over the K-blocks, temporary memory of one block."""

    def step(acc, block):
        return acc + scaled_product(*block), None

    blocks = (
        k_major_blocks(a),
        k_major_blocks(b),
        row_scales(a_scale, a.shape[0]),
        row_scales(b_scale, b.shape[0]),
    )
    acc, _ = lax.scan(step, jnp.zeros((a.shape[0], b.shape[0]), jnp.float32), blocks)
    return (acc if accumulate is None else accumulate + acc).astype(out_dtype)

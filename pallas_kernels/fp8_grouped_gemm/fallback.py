"""The grouped FP8 GEMMs in XLA: a loop over aligned row tiles (or 128-token blocks), each with its group's operand.

Padding tiles are skipped, so the work is that of the rows present. Within a tile the order of addition is DeepSeek's.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import BLOCK
from pallas_kernels.fp8_gemm.fallback import fp8_gemm, k_major_blocks, scaled_product
from pallas_kernels.groups import masked_groups, tile_groups


def fp8_grouped_gemm(a, a_scale, b, b_scale, group_ids, *, out_dtype, alignment: int) -> jax.Array:
    """a [M, K], b [G, N, K], group_ids [M] -> [M, N]; padding rows are zero."""
    m, n = a.shape[0], b.shape[1]

    def tile(operands):
        a_tile, a_scale_tile, ids, g = operands
        product = lax.cond(
            g >= 0,
            lambda: fp8_gemm(a_tile, a_scale_tile, b[g], b_scale[g], out_dtype=out_dtype),
            lambda: jnp.zeros((alignment, n), out_dtype),
        )
        return jnp.where(ids[:, None] >= 0, product, 0)

    tiles = [x.reshape(m // alignment, alignment, *x.shape[1:]) for x in (a, a_scale, group_ids)]
    return lax.map(tile, (*tiles, tile_groups(group_ids, alignment))).reshape(m, n)


def fp8_grouped_gemm_masked(a, a_scale, b, b_scale, masked_m, *, out_dtype) -> jax.Array:
    """a [G, M, K], b [G, N, K], masked_m [G] -> [G, M, N]; absent rows are zero."""
    g, m, k = a.shape
    rows = (a.reshape(g * m, k), a_scale.reshape(g * m, -1), b, b_scale, masked_groups(masked_m, m))
    return fp8_grouped_gemm(*rows, out_dtype=out_dtype, alignment=math.gcd(m, BLOCK)).reshape(g, m, -1)


def fp8_grouped_wgrad(a, a_scale, b, b_scale, group_sizes, accumulate=None) -> jax.Array:
    """a [M, T], b [N, T], group_sizes [G] -> [G, M, N] float32; every 128 tokens belong to one group."""
    num_groups, (m, t), n = group_sizes.shape[0], a.shape, b.shape[0]
    starts = jnp.arange(0, t, BLOCK, dtype=jnp.int32)
    group = jnp.searchsorted(jnp.cumsum(group_sizes), starts, side="right", method="compare_all").astype(
        jnp.int32
    )

    def step(acc, block):
        g, *operands = block
        return lax.cond(
            g < num_groups, lambda acc: acc.at[g].add(scaled_product(*operands)), lambda acc: acc, acc
        ), None

    blocks = (group, k_major_blocks(a), k_major_blocks(b), a_scale.T, b_scale.T)
    acc, _ = lax.scan(step, jnp.zeros((num_groups, m, n), jnp.float32), blocks)
    return acc if accumulate is None else accumulate + acc

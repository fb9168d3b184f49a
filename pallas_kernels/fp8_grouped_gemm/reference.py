"""Defines what the grouped FP8 GEMMs mean: one dequantised float32 product per group, rows of other groups zero.

Legend: G groups, M rows, N outputs, K contraction, T tokens contracted by a weight gradient.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import ROW_TILE, SQUARE_BLOCK
from pallas_kernels.grouped_gemm.reference import grouped_gemm, grouped_wgrad
from pallas_kernels.groups import masked_groups
from pallas_kernels.quantize.reference import dequantize


def fp8_grouped_gemm(a, a_scale, b, b_scale, group_ids, *, out_dtype) -> jax.Array:
    """a [M, K], b [G, N, K], group_ids [M] -> [M, N]."""
    return grouped_gemm(
        dequantize(a, a_scale, ROW_TILE), dequantize(b, b_scale, SQUARE_BLOCK), group_ids, out_dtype=out_dtype
    )


def fp8_grouped_gemm_masked(a, a_scale, b, b_scale, masked_m, *, out_dtype) -> jax.Array:
    """a [G, M, K], b [G, N, K], masked_m [G] -> [G, M, N]; absent rows, which mean nothing, are zero."""
    g, m, k = a.shape
    rows = (a.reshape(g * m, k), a_scale.reshape(g * m, -1), b, b_scale, masked_groups(masked_m, m))
    return fp8_grouped_gemm(*rows, out_dtype=out_dtype).reshape(g, m, -1)


def fp8_grouped_wgrad(a, a_scale, b, b_scale, group_sizes, accumulate=None) -> jax.Array:
    """a [M, T], b [N, T], group_sizes [G] -> [G, M, N] float32."""
    a32, b32 = dequantize(a, a_scale, ROW_TILE), dequantize(b, b_scale, ROW_TILE)
    return grouped_wgrad(a32.T, b32.T, group_sizes, accumulate, out_dtype=jnp.float32)

"""Defines what the FP8 GEMM means: dequantise both operands to float32 and multiply."""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import ROW_TILE, SQUARE_BLOCK
from pallas_kernels.quantize.reference import dequantize


def b_block(b: jax.Array, b_scale: jax.Array) -> tuple[int, int]:
    """Reads the block of the second operand in its scales: one row each (1D1D) or 128 rows each (1D2D)."""
    return ROW_TILE if b_scale.shape[-2] == b.shape[-2] else SQUARE_BLOCK


def fp8_gemm(a, a_scale, b, b_scale, accumulate=None, *, out_dtype=jnp.float32) -> jax.Array:
    """(a * a_scale) @ (b * b_scale).T + accumulate in float32."""
    a32 = dequantize(a, a_scale, ROW_TILE)
    b32 = dequantize(b, b_scale, b_block(b, b_scale))
    out = jnp.dot(a32, b32.T, precision="highest")
    return (out if accumulate is None else accumulate + out).astype(out_dtype)

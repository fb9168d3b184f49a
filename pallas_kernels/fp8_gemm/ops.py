"""Public function of the FP8 GEMM.

Legend: M rows (tokens), N outputs, K contraction. DeepSeek-V3 report, section 3.3.2.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import ROW_TILE, SQUARE_BLOCK, check_quantized
from pallas_kernels.dispatch import dispatch
from pallas_kernels.fp8_gemm import fallback, kernel, reference
from pallas_kernels.fp8_gemm.shapes import tile_config
from pallas_kernels.matmul import check_accumulate, unsupported
from pallas_kernels.tiles import TileConfig


def fp8_gemm(
    a: jax.Array,
    a_scale: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    out_dtype=jnp.bfloat16,
    accumulate: jax.Array | None = None,
    implementation: str | None = None,
    config: TileConfig | None = None,
) -> jax.Array:
    """a @ b.T of quantised operands, promoted to float32 every 128 of the contraction.

    Args:
      a, a_scale: [M, K] float8_e4m3fn in 1x128 tiles, [M, ceil(K/128)] float32.
      b, b_scale: [N, K] float8_e4m3fn, float32 scales of 128x128 blocks [ceil(N/128), ceil(K/128)] (fprop, dgrad) or of
        1x128 tiles [N, ceil(K/128)] (wgrad).
      out_dtype: bfloat16 or float32.
      accumulate: [M, N] of out_dtype added to the product, as in a weight gradient over several micro-batches.
      implementation: None (by platform), "mosaic", "xla" or "reference".
      config: tiling of the kernel; None takes it from the table in `shapes.py`.

    Returns:
      [M, N] in out_dtype.

    Raises:
      ValueError: operands that do not belong together, or "mosaic" asked for what the kernel does not support.
    """
    if a.shape[-1:] != b.shape[-1:]:
        raise ValueError(f"fp8_gemm: a contracts {a.shape[-1]} and b {b.shape[-1]}; b is stored [N, K]")
    check_quantized("fp8_gemm", "a", a, a_scale, 2, ROW_TILE)
    check_quantized("fp8_gemm", "b", b, b_scale, 2, SQUARE_BLOCK, ROW_TILE)
    check_accumulate("fp8_gemm", accumulate, (a.shape[0], b.shape[0]), out_dtype)
    (m, k), n = a.shape, b.shape[0]
    config = (config or tile_config(m, n, k)).placed()
    operands = (a, a_scale, b, b_scale, accumulate)
    return dispatch(
        "fp8_gemm",
        implementation,
        *operands,
        mosaic=functools.partial(kernel.fp8_gemm, out_dtype=out_dtype, config=config),
        xla=functools.partial(fallback.fp8_gemm, out_dtype=out_dtype),
        reference=functools.partial(reference.fp8_gemm, out_dtype=out_dtype),
        unsupported=unsupported(m, n, k, out_dtype),
    )

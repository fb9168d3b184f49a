"""Public function of the FP8 GEMM.

Legend: M rows (tokens), N outputs, K contraction. DeepSeek-V3 report, section 3.3.2.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import ROW_TILE, SQUARE_BLOCK, num_blocks
from pallas_kernels.dispatch import dispatch
from pallas_kernels.fp8_gemm import fallback, kernel, reference
from pallas_kernels.fp8_gemm.shapes import tile_config
from pallas_kernels.matmul import TileConfig


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
      accumulate: [M, N] float32 added to the product, as in a weight gradient over several micro-batches; needs
        out_dtype float32.
      implementation: None (by platform), "mosaic", "xla" or "reference".
      config: tiling of the kernel; None takes it from the table in `shapes.py`.

    Returns:
      [M, N] in out_dtype.

    Raises:
      ValueError: operands that do not belong together, or "mosaic" asked for what the kernel does not support.
    """
    _check(a, a_scale, b, b_scale, out_dtype, accumulate)
    m, k = a.shape
    n = b.shape[0]
    recipe = "1d1d" if b_scale.shape[0] == n else "1d2d"
    config = config or tile_config(m, n, k, recipe)
    return dispatch(
        "fp8_gemm",
        implementation,
        a,
        a_scale,
        b,
        b_scale,
        accumulate,
        mosaic=functools.partial(kernel.fp8_gemm, out_dtype=out_dtype, config=config),
        xla=functools.partial(fallback.fp8_gemm, out_dtype=out_dtype),
        reference=functools.partial(reference.fp8_gemm, out_dtype=out_dtype),
        unsupported=kernel.unsupported(m, n, k, out_dtype),
    )


def _check(a, a_scale, b, b_scale, out_dtype, accumulate) -> None:
    for name, q in (("a", a), ("b", b)):
        if q.dtype != jnp.float8_e4m3fn or q.ndim != 2:
            raise ValueError(f"fp8_gemm: {name} is {q.dtype}{list(q.shape)}; expected a float8_e4m3fn matrix")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"fp8_gemm: a contracts {a.shape[1]} and b {b.shape[1]}; b is stored [N, K]")
    if a_scale.shape != num_blocks(a.shape, ROW_TILE):
        raise ValueError(
            f"fp8_gemm: a_scale has shape {a_scale.shape}; a {a.shape} needs {num_blocks(a.shape, ROW_TILE)}"
        )
    allowed = [num_blocks(b.shape, SQUARE_BLOCK), num_blocks(b.shape, ROW_TILE)]
    if b_scale.shape not in allowed:
        raise ValueError(
            f"fp8_gemm: b_scale has shape {b_scale.shape}; b {b.shape} needs {allowed[0]} or {allowed[1]}"
        )
    if accumulate is not None and (
        accumulate.shape != (a.shape[0], b.shape[0])
        or accumulate.dtype != jnp.float32
        or jnp.dtype(out_dtype) != jnp.float32
    ):
        raise ValueError(
            f"fp8_gemm: accumulate is {accumulate.dtype}{list(accumulate.shape)} with out_dtype "
            f"{jnp.dtype(out_dtype).name}; both must be float32, of shape {[a.shape[0], b.shape[0]]}"
        )

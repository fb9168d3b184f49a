"""Public functions of the grouped FP8 GEMM: routed experts in training, prefill and decoding.

Legend: G groups (experts), M rows sorted by group, N outputs, K contraction, T tokens contracted by a weight gradient.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BLOCK, ROW_TILE, SQUARE_BLOCK, check_quantized
from pallas_kernels.dispatch import dispatch
from pallas_kernels.fp8_grouped_gemm import fallback, kernel, reference
from pallas_kernels.fp8_grouped_gemm.shapes import gemm_config, masked_config, wgrad_config
from pallas_kernels.groups import check_rows, check_sizes
from pallas_kernels.matmul import check_accumulate, unsupported
from pallas_kernels.tiles import TileConfig


def fp8_grouped_gemm(
    a: jax.Array,
    a_scale: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    group_ids: jax.Array,
    out_dtype=jnp.bfloat16,
    alignment: int = BLOCK,
    implementation: str | None = None,
    config: TileConfig | None = None,
) -> jax.Array:
    """Each row of a times the matrix of its group, a[i] @ b[group_ids[i]].T, promoted to float32 every 128 of K.

    Args:
      a, a_scale: [M, K] float8_e4m3fn in 1x128 tiles, [M, ceil(K/128)] float32; rows sorted by group.
      b, b_scale: [G, N, K] float8_e4m3fn in 128x128 blocks, [G, ceil(N/128), ceil(K/128)] float32.
      group_ids: [M] int32, -1 for padding rows. Segments start at multiples of `alignment` (not checked on data).
      out_dtype: bfloat16 or float32.
      alignment: rows that share a group; the kernel needs a multiple of 64.
      implementation: None (by platform), "mosaic", "xla" or "reference".
      config: tiling of the kernel; None takes it from `shapes.py`.

    Returns:
      [M, N] in out_dtype, zero in padding rows.
    """
    op = "fp8_grouped_gemm"
    check_rows(op, a.shape[0], group_ids, alignment)
    _check_operands(op, a, a_scale, b, b_scale)
    (m, k), n = a.shape, b.shape[1]
    config = (config or gemm_config(alignment, n)).placed()
    operands = (a, a_scale, b, b_scale, group_ids)
    return dispatch(
        op,
        implementation,
        *operands,
        mosaic=functools.partial(kernel.fp8_grouped_gemm, out_dtype=out_dtype, config=config),
        xla=functools.partial(fallback.fp8_grouped_gemm, out_dtype=out_dtype, alignment=alignment),
        reference=functools.partial(reference.fp8_grouped_gemm, out_dtype=out_dtype),
        unsupported=unsupported(m, n, k, out_dtype, alignment, config.tile_m),
    )


def fp8_grouped_gemm_masked(
    a: jax.Array,
    a_scale: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    masked_m: jax.Array,
    out_dtype=jnp.bfloat16,
    implementation: str | None = None,
    config: TileConfig | None = None,
) -> jax.Array:
    """The grouped GEMM of decoding: every group has room for M rows, of which the first masked_m[g] are present.

    Args:
      a, a_scale: [G, M, K] float8_e4m3fn, [G, M, ceil(K/128)] float32.
      b, b_scale: as in `fp8_grouped_gemm`.
      masked_m: [G] int32 rows present.

    Returns:
      [G, M, N] in out_dtype. What stands in absent rows is undefined: the kernel does not write their tiles, which may hold
      anything, NaN included. Select the present rows before they meet others.
    """
    op = "fp8_grouped_gemm_masked"
    if a.ndim != 3 or masked_m.shape != a.shape[:1] or masked_m.dtype != jnp.int32:
        raise ValueError(
            f"{op}: a has shape {a.shape}, masked_m is {masked_m.dtype}{list(masked_m.shape)}; "
            "expected [G, M, K] and int32[G]"
        )
    _check_operands(op, a, a_scale, b, b_scale)
    m, n, k = a.shape[1], *b.shape[1:]
    config = (config or masked_config(n)).placed()
    operands = (a, a_scale, b, b_scale, masked_m)
    return dispatch(
        op,
        implementation,
        *operands,
        mosaic=functools.partial(kernel.fp8_grouped_gemm_masked, out_dtype=out_dtype, config=config),
        xla=functools.partial(fallback.fp8_grouped_gemm_masked, out_dtype=out_dtype),
        reference=functools.partial(reference.fp8_grouped_gemm_masked, out_dtype=out_dtype),
        unsupported=unsupported(m, n, k, out_dtype, m, config.tile_m),
    )


def _check_operands(op: str, a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array) -> None:
    check_quantized(op, "a", a, a_scale, a.ndim, ROW_TILE)
    check_quantized(op, "b", b, b_scale, 3, SQUARE_BLOCK)
    if b.shape[2] != a.shape[-1]:
        raise ValueError(f"{op}: a contracts {a.shape[-1]} and b {b.shape[2]}; b is stored [G, N, K]")


def fp8_grouped_wgrad(
    a: jax.Array,
    a_scale: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    group_sizes: jax.Array,
    accumulate: jax.Array | None = None,
    implementation: str | None = None,
    config: TileConfig | None = None,
) -> jax.Array:
    """Weight gradient of every group, a @ b.T over the group's tokens, which are contiguous along the last dim.

    Args:
      a, a_scale: [M, T] float8_e4m3fn in 1x128 tiles along the tokens, [M, T/128] float32 (`quantize_transposed`).
      b, b_scale: [N, T], [N, T/128] likewise.
      group_sizes: [G] int32, tokens per group with padding: multiples of 128 (not checked on data), at most T together.
        An empty group yields zeros, or `accumulate` unchanged.
      accumulate: [G, M, N] float32 to add, as in a gradient over several micro-batches.

    Returns:
      [G, M, N] float32.
    """
    op = "fp8_grouped_wgrad"
    check_quantized(op, "a", a, a_scale, 2, ROW_TILE)
    check_quantized(op, "b", b, b_scale, 2, ROW_TILE)
    (m, t), n = a.shape, b.shape[0]
    if b.shape[1] != t:
        raise ValueError(f"{op}: a has {t} tokens and b {b.shape[1]}")
    check_sizes(op, t, group_sizes, BLOCK)
    check_accumulate(op, accumulate, (group_sizes.shape[0], m, n), jnp.float32)
    config = (config or wgrad_config(m, n)).placed()
    operands = (a, a_scale, b, b_scale, group_sizes, accumulate)
    return dispatch(
        op,
        implementation,
        *operands,
        mosaic=functools.partial(kernel.fp8_grouped_wgrad, config=config),
        xla=fallback.fp8_grouped_wgrad,
        reference=reference.fp8_grouped_wgrad,
        unsupported=unsupported(m, n, t, jnp.float32),
    )

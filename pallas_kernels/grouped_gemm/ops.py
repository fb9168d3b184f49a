"""Public functions of the BF16 grouped GEMM, which routed experts use on GPU without FP8.

Legend: G groups (experts), M rows sorted by group, N outputs, K contraction, T tokens contracted by a weight gradient.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BLOCK
from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_gemm import fallback, kernel, reference
from pallas_kernels.grouped_gemm.shapes import gemm_config, wgrad_config
from pallas_kernels.groups import check_rows, check_sizes
from pallas_kernels.matmul import check_accumulate, unsupported
from pallas_kernels.tiles import TileConfig


def grouped_gemm(
    a: jax.Array,
    b: jax.Array,
    group_ids: jax.Array,
    transpose_b: bool = True,
    out_dtype=None,
    alignment: int = BLOCK,
    implementation: str | None = None,
    config: TileConfig | None = None,
) -> jax.Array:
    """Each row of a times the matrix of its group: a[i] @ b[group_ids[i]].T.

    Args:
      a: [M, K] rows sorted by group.
      b: [G, N, K]; with transpose_b=False [G, K, N], so that the forward pass (b = W [G, N, K]) and the input gradient
        (a = dy, b = W) take the same weight.
      group_ids: [M] int32, -1 for padding rows. Segments start at multiples of `alignment` (not checked on data).
      out_dtype: None for a's dtype.
      alignment: rows that share a group; the kernel needs a multiple of 64.
      implementation: None (by platform), "mosaic", "xla" or "reference".
      config: tiling of the kernel; None takes it from `shapes.py`.

    Returns:
      [M, N], zero in padding rows; accumulated in float32.
    """
    check_rows("grouped_gemm", a.shape[0], group_ids, alignment)
    n = b.shape[1 if transpose_b else 2] if b.ndim == 3 else None
    if n is None or b.shape[2 if transpose_b else 1] != a.shape[1] or a.dtype != b.dtype:
        raise ValueError(
            f"grouped_gemm: a {a.dtype}{list(a.shape)} and b {b.dtype}{list(b.shape)} do not fit with "
            f"transpose_b={transpose_b}; b is [G, N, K], or [G, K, N] with transpose_b=False"
        )
    (m, k), out_dtype = a.shape, a.dtype if out_dtype is None else out_dtype
    config = (config or gemm_config(alignment, n)).placed()
    static = {"transpose_b": transpose_b, "out_dtype": out_dtype}
    return dispatch(
        "grouped_gemm",
        implementation,
        a,
        b,
        group_ids,
        mosaic=functools.partial(kernel.grouped_gemm, config=config, **static),
        xla=functools.partial(fallback.grouped_gemm, alignment=alignment, **static),
        reference=functools.partial(reference.grouped_gemm, **static),
        unsupported=_unsupported(a.dtype, m, n, k, out_dtype, alignment, config.tile_m),
    )


def grouped_wgrad(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    accumulate: jax.Array | None = None,
    out_dtype=jnp.float32,
    alignment: int = BLOCK,
    implementation: str | None = None,
    config: TileConfig | None = None,
) -> jax.Array:
    """Weight gradient of every group: a.T @ b over the group's tokens.

    Args:
      a, b: [T, M] and [T, N] rows sorted by group, padding rows zero in at least one of them.
      group_sizes: [G] int32, tokens per group, with or without its padding: each segment ends at the next multiple of
        `alignment`, the last one within T. An empty group yields zeros, or `accumulate` unchanged.
      accumulate: [G, M, N] of out_dtype, added to the product.

    Returns:
      [G, M, N] in out_dtype.
    """
    check_sizes("grouped_wgrad", a.shape[0], group_sizes, alignment)
    if a.shape[0] != b.shape[0] or a.dtype != b.dtype:
        raise ValueError(
            f"grouped_wgrad: a {a.dtype}{list(a.shape)} and b {b.dtype}{list(b.shape)} need equal rows and dtype"
        )
    (t, m), n = a.shape, b.shape[1]
    check_accumulate("grouped_wgrad", accumulate, (group_sizes.shape[0], m, n), out_dtype)
    config = (config or wgrad_config(m, n)).placed()
    static = {"out_dtype": out_dtype, "alignment": alignment}
    operands = (a, b, group_sizes, accumulate)
    return dispatch(
        "grouped_wgrad",
        implementation,
        *operands,
        mosaic=functools.partial(kernel.grouped_wgrad, config=config, **static),
        xla=functools.partial(fallback.grouped_wgrad, **static),
        reference=functools.partial(reference.grouped_wgrad, **static),
        unsupported=_unsupported(a.dtype, m, n, t, out_dtype, alignment, kernel.TILE_K),
    )


def _unsupported(dtype, *product) -> str | None:
    return (
        unsupported(*product) if dtype == jnp.bfloat16 else f"dtype {dtype}; the kernel multiplies bfloat16"
    )

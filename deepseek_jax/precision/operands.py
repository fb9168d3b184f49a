"""Quantised operands of a GEMM and their products (report sections 3.3.1 and 3.3.2).

An operand is a matrix [rows, depth] whose last dim is contracted; a GEMM is `a @ b.T`. A `Format` says which
elements share a scale; operands carry theirs. Fine-grained formats (128 along the contraction) multiply in `pallas_kernels.fp8_gemm`,
promoted to float32 every 128; coarse formats scale the finished product.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import BLOCK, cdiv, expand_scale, split_blocks
from pallas_kernels.fp8_gemm.ops import fp8_gemm
from pallas_kernels.fp8_grouped_gemm.ops import fp8_grouped_gemm, fp8_grouped_gemm_masked, fp8_grouped_wgrad
from pallas_kernels.grouped_gemm.ops import grouped_gemm, grouped_wgrad
from pallas_kernels.groups import Groups, Masked, aligned_sizes
from pallas_kernels.quantize.fallback import scale_from_amax
from pallas_kernels.quantize.ops import dequantize, quantize, quantize_transposed, requantize_transposed
from pallas_kernels.quantize.reference import divide


@dataclasses.dataclass(frozen=True)
class Format:
    """E4M3 with one scale per block of `rows` x `depth` elements; None spans the whole operand.

    scale: "fp32" or "ue8m0" (rounded up to a power of two).
    """

    rows: int | None
    depth: int | None
    scale: str = "fp32"

    @property
    def fine(self) -> bool:
        return self.depth == BLOCK

    @property
    def square(self) -> bool:
        """The transposed operand has the transposed blocks: one quantisation serves both."""
        return self.rows == self.depth

    @property
    def transposed(self) -> "Format":
        """The blocks of the transposed operand."""
        return Format(self.depth, self.rows, self.scale)


TILE = Format(1, BLOCK)  # activations and gradients
SQUARE = Format(BLOCK, BLOCK)  # weights
ROW = Format(1, None)  # per token, or per channel
TENSOR = Format(None, None)


def power_of_two(fmt: Format) -> Format:
    return dataclasses.replace(fmt, scale="ue8m0")


@flax.struct.dataclass
class Operand:
    """A quantised matrix: q [..., rows, depth] float8_e4m3fn, scale float32 with one entry per block of `format`."""

    q: jax.Array
    scale: jax.Array
    format: Format = flax.struct.field(pytree_node=False)


def _block(fmt: Format, shape: tuple[int, ...]) -> tuple[int, int]:
    return fmt.rows or shape[-2], fmt.depth or shape[-1]


def _quantize_coarse(x: jax.Array, fmt: Format) -> Operand:
    """One scale per row or column, or one in all: what the fine-grained quantiser makes of the largest magnitude."""
    axes = tuple(axis for axis, size in ((-2, fmt.rows), (-1, fmt.depth)) if size is None)
    x = x.astype(jnp.float32)
    scale = scale_from_amax(jnp.max(jnp.abs(x), axis=axes, keepdims=True), fmt.scale)
    return Operand(divide(x, scale).astype(jnp.float8_e4m3fn), scale, fmt)


def quantise(x: jax.Array, fmt: Format) -> Operand:
    """x [..., rows, depth] -> Operand; a non-finite element dequantises to NaN."""
    if fmt.rows is None or fmt.depth is None:
        return _quantize_coarse(x, fmt)
    return Operand(*quantize(x, _block(fmt, x.shape), fmt.scale), fmt)


def quantise_part(
    x: jax.Array,
    fmt: Format,
    rows: jax.Array,
    columns: jax.Array | None,
    whole: tuple[int, int],
    largest: Callable[[jax.Array], jax.Array],
) -> Operand:
    """Some rows of an operand, whole or some columns of them, with the scales that the whole operand's elements give.

    Args:
      x: [..., n, m], this device's part.
      rows: int32 [n], which rows of the whole they are; blocks may have rows elsewhere.
      columns: int32 [m], which columns; None: all.
      whole: rows and depth of the whole.
      largest: maximum over the devices that have the other parts.

    Returns:
      Operand of q [..., n, m] and the scales of the whole: bit for bit what `quantise` makes of it.
    """
    height, width = fmt.rows or whole[0], fmt.depth or whole[1]
    x, block = x.astype(jnp.float32), rows // height
    if columns is None:
        amax = jnp.max(jnp.abs(split_blocks(x, (1, width))), axis=(-3, -1))
    else:
        along = jnp.zeros((*x.shape[:-1], cdiv(whole[1], width)), x.dtype)
        amax = along.at[..., columns // width].max(jnp.abs(x))
    blocks = jnp.zeros((*amax.shape[:-2], cdiv(whole[0], height), amax.shape[-1]), amax.dtype)
    scale = scale_from_amax(largest(blocks.at[..., block, :].max(amax)), fmt.scale)
    of_rows = scale[..., block, :]
    if columns is None:
        per_element = expand_scale(of_rows, (1, width), x.shape)
    else:
        per_element = of_rows[..., columns // width]
    return Operand(divide(x, per_element).astype(jnp.float8_e4m3fn), scale, fmt)


def along_rows(x: jax.Array | Operand, fmt: Format) -> Operand:
    """The transposed operand [..., depth, rows], which a weight gradient contracts along the rows (tokens) of x.

    x is an array, or was quantised for another product: it is then dequantised, transposed and quantised again.
    """
    tiles = fmt.fine and fmt.rows == 1
    if isinstance(x, Operand):
        if tiles and x.format.fine and x.format.rows == 1:
            return Operand(*requantize_transposed(x.q, x.scale, fmt.scale), fmt)
        x = dequantise(x)
    if tiles:
        return Operand(*quantize_transposed(x, fmt.scale), fmt)
    return quantise(jnp.swapaxes(x, -1, -2), fmt)


def dequantise(x: Operand, dtype: Any = jnp.float32) -> jax.Array:
    """q * scale, in `dtype`."""
    if x.format.fine:
        return dequantize(x.q, x.scale, _block(x.format, x.q.shape), dtype)
    return (x.q.astype(jnp.float32) * x.scale).astype(dtype)


def transpose(x: Operand) -> Operand:
    """The operand of the transposed matrix, in the transposed blocks."""
    return Operand(jnp.swapaxes(x.q, -1, -2), jnp.swapaxes(x.scale, -1, -2), x.format.transposed)


def keep(x: Operand) -> Operand:
    """An operand as the forward pass saves it, its E4M3 values as bytes.

    `jax.checkpoint` puts the floats it saves through `reduce_precision`, which knows IEEE formats only: E4M3 values
    above 240 would become infinite.
    """
    return x.replace(q=lax.bitcast_convert_type(x.q, jnp.uint8))  # type: ignore[attr-defined]


def restore(x: Operand) -> Operand:
    """Inverse of `keep`."""
    return x.replace(q=lax.bitcast_convert_type(x.q, jnp.float8_e4m3fn))  # type: ignore[attr-defined]


def row_scales(x: Operand) -> jax.Array:
    """Scales with one entry per row."""
    rows = x.q.shape[-2]
    return (
        x.scale if x.format.rows == 1 else jnp.repeat(x.scale, x.format.rows or rows, axis=-2)[..., :rows, :]
    )


def copies(x: jax.Array, index_m: jax.Array) -> jax.Array:
    """Copies of rows of x; zeros for an index behind the last.

    One gather that knows what lies behind: beside `where`, XLA for GPUs keeps zeros of the size of the result in memory
    and reads them, too.
    """
    return x.at[index_m].get(mode="fill", fill_value=0)


def take_rows(x: Operand, index_m: jax.Array) -> Operand:
    """Copies of rows of x, each with a scale of its own; zeros for an index behind the last."""
    if x.format.rows is None:
        return x.replace(q=copies(x.q, index_m))  # type: ignore[attr-defined]
    scale = copies(row_scales(x), index_m)
    return Operand(copies(x.q, index_m), scale, dataclasses.replace(x.format, rows=1))


# --- products ---------------------------------------------------------------------------------------------


def rows_between(x: Operand, start: int, stop: int) -> Operand:
    """Rows of x, which begin and end with blocks of its scales, but at the end of x."""
    rows = x.format.rows
    assert rows is not None and start % rows == 0
    return Operand(x.q[start:stop], x.scale[start // rows : cdiv(stop, rows)], x.format)


def multiply(
    a: Operand, b: Operand, dtype: Any, groups: Groups | None = None, onto: jax.Array | None = None
) -> jax.Array:
    """a @ b.T [M, N] in `dtype` (bfloat16 or float32), accumulated in float32; without `groups` plus `onto` [M, N], if it is
    given, in `dtype`.

    With `groups`, b is [G, N, depth] and each row of a is multiplied by the matrix of its group; padding rows are zero,
    absent rows of `Masked` groups may be anything.
    """
    if a.format.fine:
        if groups is None:
            return fp8_gemm(a.q, row_scales(a), b.q, b.scale, dtype, onto)
        if isinstance(groups, Masked):
            a_q, a_scale = (x.reshape(-1, groups.room, x.shape[1]) for x in (a.q, row_scales(a)))
            out = fp8_grouped_gemm_masked(a_q, a_scale, b.q, b.scale, groups.sizes_e, out_dtype=dtype)
            return out.reshape(a.q.shape[0], -1)
        return fp8_grouped_gemm(a.q, row_scales(a), b.q, b.scale, groups.group_m, out_dtype=dtype)
    # E4M3 is exact in every wider format; the scales factor out of the sum.
    a_q, b_q = a.q.astype(jnp.float32), b.q.astype(jnp.float32)
    if groups is None:
        product = lax.dot_general(a_q, b_q, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
        product = (product * (a.scale * b.scale.T)).astype(dtype)
        return product if onto is None else onto + product
    b_scale = jnp.swapaxes(b.scale, -1, -2)[jnp.maximum(groups.group_m, 0), 0]
    return (grouped_gemm(a_q, b_q, groups.group_m) * (a.scale * b_scale)).astype(dtype)


def multiply_groups(a: Operand, b: Operand, groups: Groups, onto: jax.Array | None = None) -> jax.Array:
    """a [in, M], b [out, M] -> a @ b.T over the rows of each group [G, in, out], float32; plus `onto`, if it is given."""
    sizes = aligned_sizes(groups.sizes_e)
    if a.format.fine:
        return fp8_grouped_wgrad(a.q, row_scales(a), b.q, row_scales(b), sizes, onto)
    a_q, b_q = a.q.astype(jnp.float32).T, b.q.astype(jnp.float32).T
    product = grouped_wgrad(a_q, b_q, sizes) * (a.scale * b.scale.T)[None]
    return product if onto is None else onto + product


def sum_of_two(
    first: tuple[Operand, Operand], second: tuple[Operand, Operand], dtype: Any, groups: Groups | None
) -> jax.Array:
    """a @ b.T of the first pair plus that of the second, in `dtype`, added up in float32: one product of both depths,
    whose sum no memory sees, where scales go with blocks and the blocks are whole."""

    def joined(x: Operand, y: Operand) -> Operand:
        q, scale = (jnp.concatenate(parts, axis=-1) for parts in ((x.q, y.q), (x.scale, y.scale)))
        return Operand(q, scale, x.format)

    (a, b), (c, d) = first, second
    if a.format.fine and a.q.shape[-1] % BLOCK == 0:
        return multiply(joined(a, c), joined(b, d), dtype, groups)
    return (multiply(a, b, jnp.float32, groups) + multiply(c, d, jnp.float32, groups)).astype(dtype)

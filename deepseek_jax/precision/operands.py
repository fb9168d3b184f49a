"""Quantised operands of a GEMM and their products (report sections 3.3.1 and 3.3.2).

An operand is a matrix [rows, depth] whose last dim is contracted; a GEMM is `a @ b.T`. A `Format` says which
elements share a scale. Fine-grained formats (128 along the contraction) multiply in `pallas_kernels.fp8_gemm`,
promoted to float32 every 128; coarse formats scale the finished product.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import BLOCK, cdiv, expand_scale, split_blocks
from pallas_kernels.fp8_gemm.ops import fp8_gemm
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


class Operand(NamedTuple):
    """q [..., rows, depth] float8_e4m3fn, scale float32 with one entry per block."""

    q: jax.Array
    scale: jax.Array


def _block(fmt: Format, shape: tuple[int, ...]) -> tuple[int, int]:
    return fmt.rows or shape[-2], fmt.depth or shape[-1]


def _quantize_coarse(x: jax.Array, fmt: Format) -> Operand:
    """One scale per row or column, or one in all: what the fine-grained quantiser makes of the largest magnitude."""
    axes = tuple(axis for axis, size in ((-2, fmt.rows), (-1, fmt.depth)) if size is None)
    x = x.astype(jnp.float32)
    scale = scale_from_amax(jnp.max(jnp.abs(x), axis=axes, keepdims=True), fmt.scale)
    return Operand(divide(x, scale).astype(jnp.float8_e4m3fn), scale)


def quantise(x: jax.Array, fmt: Format) -> Operand:
    """x [..., rows, depth] -> Operand; a non-finite element dequantises to NaN."""
    if fmt.rows is None or fmt.depth is None:
        return _quantize_coarse(x, fmt)
    return Operand(*quantize(x, _block(fmt, x.shape), fmt.scale))


def quantise_part(
    x: jax.Array,
    fmt: Format,
    rows: jax.Array,
    total: int,
    largest: Callable[[jax.Array], jax.Array],
) -> Operand:
    """Some rows of an operand, with the scales that the whole operand's elements give.

    Args:
      x: [..., n, depth], this device's rows.
      rows: int32 [n], which rows of the whole they are; blocks may have rows elsewhere.
      total: rows of the whole.
      largest: maximum over the devices that have the other rows.

    Returns:
      Operand of q [..., n, depth] and the scales of the whole: bit for bit what `quantise` makes of it.
    """
    height, width = fmt.rows or total, fmt.depth or x.shape[-1]
    x, block = x.astype(jnp.float32), rows // height
    amax = jnp.max(jnp.abs(split_blocks(x, (1, width))), axis=(-3, -1))
    blocks = jnp.zeros((*amax.shape[:-2], cdiv(total, height), amax.shape[-1]), amax.dtype)
    scale = scale_from_amax(largest(blocks.at[..., block, :].max(amax)), fmt.scale)
    per_element = expand_scale(scale[..., block, :], (1, width), x.shape)
    return Operand(divide(x, per_element).astype(jnp.float8_e4m3fn), scale)


def quantise_transposed(x: jax.Array, fmt: Format) -> Operand:
    """x [..., depth, rows] -> Operand of its transpose: an operand of a weight gradient."""
    if fmt.fine and fmt.rows == 1:
        return Operand(*quantize_transposed(x, fmt.scale))
    return quantise(jnp.swapaxes(x, -1, -2), fmt)


def dequantise(x: Operand, fmt: Format, dtype=jnp.float32) -> jax.Array:
    """q * scale, in `dtype`."""
    if fmt.fine:
        return dequantize(x.q, x.scale, _block(fmt, x.q.shape), dtype)
    return (x.q.astype(jnp.float32) * x.scale).astype(dtype)


def requantise_transposed(x: Operand, fmt: Format, new: Format) -> Operand:
    """What the forward pass saved, in `fmt` -> its transpose in `new`, for the weight gradient."""
    if fmt.rows == new.rows == 1 and fmt.fine and new.fine:
        return Operand(*requantize_transposed(*x, new.scale))
    return quantise_transposed(dequantise(x, fmt), new)


def transpose(x: Operand) -> Operand:
    return Operand(*(jnp.swapaxes(part, -1, -2) for part in x))


def keep(x: Operand) -> Operand:
    """An operand as the forward pass saves it, its E4M3 values as bytes.

    `jax.checkpoint` puts the floats it saves through `reduce_precision`, which knows IEEE formats only: E4M3 values
    above 240 would become infinite.
    """
    return Operand(lax.bitcast_convert_type(x.q, jnp.uint8), x.scale)


def restore(x: Operand) -> Operand:
    """Inverse of `keep`."""
    return Operand(lax.bitcast_convert_type(x.q, jnp.float8_e4m3fn), x.scale)


def row_scales(x: Operand, fmt: Format) -> jax.Array:
    """Scales with one entry per row."""
    rows = x.q.shape[-2]
    return x.scale if fmt.rows == 1 else jnp.repeat(x.scale, fmt.rows or rows, axis=-2)[..., :rows, :]


def summed(
    multiply: Callable[[Operand, Operand, Any], jax.Array],
    first: tuple[Operand, Operand],
    second: tuple[Operand, Operand],
    fmt: Format,
    dtype: Any,
) -> jax.Array:
    """a @ b.T of the first pair plus that of the second, in `dtype`, added up in float32: one product of both depths,
    whose sum no memory sees, where scales go with blocks and the blocks are whole. `fmt`: of the operands a."""

    def joined(x: Operand, y: Operand) -> Operand:
        return Operand(*(jnp.concatenate(parts, axis=-1) for parts in zip(x, y, strict=True)))

    if fmt.fine and first[0].q.shape[-1] % BLOCK == 0:
        return multiply(joined(first[0], second[0]), joined(first[1], second[1]), dtype)
    return (multiply(*first, jnp.float32) + multiply(*second, jnp.float32)).astype(dtype)


def gemm(a: Operand, b: Operand, formats: tuple[Format, Format], dtype) -> jax.Array:
    """a @ b.T [M, N] in `dtype` (bfloat16 or float32), accumulated in float32."""
    if formats[0].fine:
        return fp8_gemm(a.q, row_scales(a, formats[0]), b.q, b.scale, out_dtype=dtype)
    # E4M3 is exact in every wider format; the scales factor out of the sum.
    a_q, b_q = a.q.astype(jnp.float32), b.q.astype(jnp.float32)
    product = lax.dot_general(a_q, b_q, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
    return (product * (a.scale * b.scale.T)).astype(dtype)

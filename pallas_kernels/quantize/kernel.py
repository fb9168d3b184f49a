"""Quantises on Hopper: one tile per thread block, one pass over memory.

A warpgroup loads a tile by TMA, holds it in registers as [64, 128], reduces each row to its scale, and stores q and
scales by TMA. Tiles along columns are read through a transposed reference, so that the reduction still runs along rows.
Row scales leave the kernel as [C/128, R] (rows contiguous, as TMA and the GEMMs want them) and are transposed outside;
XLA cancels that against the transposition in front of the GEMM.

Legend: R, C rows and columns of the quantised output, M, K those of the input, T tokens, F channels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK, COLUMN_TILE, ROW_TILE, Block, pad_last2, round_up
from pallas_kernels.compat import JAX_VERSION, compiler_params, swizzled
from pallas_kernels.quantize.fallback import scale_from_amax
from pallas_kernels.quantize.reference import divide

E4M3 = jnp.float8_e4m3fn
ROWS = 64  # height of a tile in registers: the rows of one wgmma layout


def unsupported(shape: tuple[int, ...], dtype) -> str | None:
    """Says why the kernels cannot quantise such an array, or None."""
    if dtype not in (jnp.bfloat16, jnp.float32, E4M3):
        return f"dtype {jnp.dtype(dtype).name}; the kernel reads bfloat16 or float32"
    return f"the array is empty, {list(shape)}" if 0 in shape else None


def transposed_unsupported(shape: tuple[int, ...], dtype) -> str | None:
    if len(shape) != 2:
        return f"shape {shape}: only matrices are transposed"
    if dtype == E4M3 and JAX_VERSION < (0, 11):
        return "jax 0.10 searches half a minute for the layouts of this kernel; jax 0.11 and later find them at once"
    return unsupported(shape, dtype)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where the float32 values of a tile come from.

    Attributes:
      operands: arrays in global memory.
      buffers: shared memory: one per operand slice, then any that `value` needs.
      copies: (operand refs, row start, column start) -> the slices that the first buffers receive.
      value: buffer refs -> [64, 128] float32 in registers.
    """

    operands: Sequence[jax.Array]
    buffers: Sequence[Any]
    copies: Callable
    value: Callable
    num_copies: int = 1


def _registers(ref) -> jax.Array:
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA).astype(jnp.float32)


def _buffer(rows: int, cols: int, dtype) -> Any:
    return plgpu.SMEM((rows, cols), dtype, transforms=swizzled(dtype, cols))


def _row_amax(y: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.max(y, axis=1), -jnp.min(y, axis=1))


def _over(v: jax.Array, shape: tuple[int, ...], dim: int) -> jax.Array:
    """Broadcasts a vector that lies along `dim`."""
    return lax.broadcast_in_dim(plgpu.layout_cast(v, plgpu.Layout.WGMMA.reduce(1 - dim)), shape, (dim,))


def _launch(body, operands, buffers, shape, tile: Block, scale_shape, copies: int = 1) -> list[jax.Array]:
    """Runs one thread block per tile of the output.

    Args:
      body: (*operand refs, q and s in global memory, *buffers, q and s in shared memory, barrier of the loads) -> None.
      operands, buffers: arrays, and the shared memory of a tile of them.
      shape, tile: of q; a multiple of the tile, whose scales are a vector of its shorter extent.
      scale_shape: of s.
      copies: loads that the barrier waits for.

    Returns:
      [q, s].
    """
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, E4M3), jax.ShapeDtypeStruct(scale_shape, jnp.float32)],
        scratch_types=[
            *buffers,
            _buffer(*tile, E4M3),
            plgpu.SMEM((min(tile),), jnp.float32),
            plgpu.Barrier(num_arrivals=copies),
        ],
        grid=(shape[0] // tile[0], shape[1] // tile[1]),
        grid_names=("rows", "cols"),
        compiler_params=compiler_params(),
    )(*operands)


def _row_tiles(source: _Source, shape: tuple[int, ...], scale: str) -> tuple[jax.Array, jax.Array]:
    """Quantises an [R, C] array in 1x128 tiles: q [R, C], s [R, C/128]."""
    r, c = shape
    num_operands = len(source.operands)

    def body(*refs):
        operands, (q_g, s_g, *buffers, q_s, s_s, loaded) = refs[:num_operands], refs[num_operands:]
        ri, ci = lax.axis_index("rows"), lax.axis_index("cols")
        rows, cols = pl.ds(ri * ROWS, ROWS), pl.ds(ci * BLOCK, BLOCK)
        pieces = source.copies(operands, ri * ROWS, ci * BLOCK)
        for piece, buffer in zip(pieces, buffers[: source.num_copies], strict=True):
            plgpu.copy_gmem_to_smem(piece, buffer, loaded)
        plgpu.barrier_wait(loaded)
        y = source.value(buffers)
        s = scale_from_amax(_row_amax(y), scale)
        q_s[...] = divide(y, _over(s, y.shape, 0)).astype(E4M3)
        s_s[...] = s
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, q_g.at[rows, cols])
        plgpu.copy_smem_to_gmem(s_s, s_g.at[ci, rows])
        plgpu.wait_smem_to_gmem(0)

    sources = (source.operands, source.buffers)
    q, s = _launch(body, *sources, shape, (ROWS, BLOCK), (c // BLOCK, r), source.num_copies)
    return q, s.T


@functools.partial(jax.jit, static_argnames=("block", "scale"))
def quantize(x: jax.Array, *, block: Block, scale: str) -> tuple[jax.Array, jax.Array]:
    """x [..., M, K] in any of the three blocks; leading dims join the rows. Ragged extents are padded with zeros to whole
    tiles, which changes no scale."""
    *lead, m, k = x.shape
    if block == ROW_TILE:
        return _cut(_plain(pad_last2(x.reshape(-1, k), (ROWS, BLOCK))), x.shape, scale)
    columns = block == COLUMN_TILE
    padded = pad_last2(x, (BLOCK, ROWS if columns else BLOCK))
    *_, rows, cols = padded.shape
    q, s = (_column_tiles if columns else _square_blocks)(padded.reshape(-1, cols), scale)
    s = s.reshape(*lead, rows // BLOCK, -1)
    return q.reshape(padded.shape)[..., :m, :k], s[..., :k] if columns else s


def _cut(source: _Source, shape: tuple[int, ...], scale: str) -> tuple[jax.Array, jax.Array]:
    """Quantises the rows of an array [..., C] of `shape`; the source holds them padded to whole tiles."""
    *lead, c = shape
    r = math.prod(lead)
    q, s = _row_tiles(source, (round_up(r, ROWS), round_up(c, BLOCK)), scale)
    return q[:r, :c].reshape(shape), s[:r].reshape(*lead, -1)


def _plain(x: jax.Array) -> _Source:
    return _Source(
        operands=[x],
        buffers=[_buffer(ROWS, BLOCK, x.dtype)],
        copies=lambda refs, row, col: [refs[0].at[pl.ds(row, ROWS), pl.ds(col, BLOCK)]],
        value=lambda buffers: _registers(buffers[0]),
    )


@functools.partial(jax.jit, static_argnames=("scale",))
def swiglu_quantize(gate_up, up, routing_weight, *, scale: str) -> tuple[jax.Array, jax.Array]:
    """silu(gate) * up * routing_weight and its 1x128 tiles; gate_up is read in place, and split in memory only where a
    tile would reach from one half into the other."""
    if up is None and gate_up.shape[-1] % (2 * BLOCK):
        gate_up, up = jnp.split(gate_up, 2, axis=-1)
    *lead, width = gate_up.shape
    f = width // 2 if up is None else width
    operands = [pad_last2(x.reshape(-1, width), (ROWS, BLOCK)) for x in (gate_up, up) if x is not None]
    buffers = [_buffer(ROWS, BLOCK, x.dtype) for x in (gate_up, gate_up if up is None else up)]
    if routing_weight is not None:
        operands.append(pad_last2(routing_weight.reshape(1, -1).astype(jnp.float32), (1, ROWS))[0])
        buffers.append(plgpu.SMEM((ROWS,), jnp.float32))

    def copies(refs, row, col):
        rows = pl.ds(row, ROWS)
        gate = refs[0].at[rows, pl.ds(col, BLOCK)]
        second_col = f + col if up is None else col
        second = refs[0 if up is None else 1].at[rows, pl.ds(second_col, BLOCK)]
        return [gate, second] if routing_weight is None else [gate, second, refs[-1].at[rows]]

    def value(refs):
        gate, second = _registers(refs[0]), _registers(refs[1])
        y = gate / (1 + jnp.exp(-gate)) * second
        return y if routing_weight is None else y * _over(refs[2][...], y.shape, 0)

    return _cut(_Source(operands, buffers, copies, value, len(buffers)), (*lead, f), scale)


@functools.partial(jax.jit, static_argnames=("scale",))
def quantize_transposed(x: jax.Array, *, scale: str) -> tuple[jax.Array, jax.Array]:
    """x [T, K] -> q [K, T], s [K, T/128]."""
    source = _Source(
        operands=[pad_last2(x, (BLOCK, ROWS))],
        buffers=[_buffer(BLOCK, ROWS, x.dtype)],
        copies=lambda refs, row, col: [refs[0].at[pl.ds(col, BLOCK), pl.ds(row, ROWS)]],
        value=lambda buffers: _registers(buffers[0].T),
    )
    return _cut(source, x.shape[::-1], scale)


@functools.partial(jax.jit, static_argnames=("scale",))
def requantize_transposed(q: jax.Array, q_scale: jax.Array, *, scale: str) -> tuple[jax.Array, jax.Array]:
    """q [T, K] in 1x128 tiles -> q [K, T] in 1x128 tiles along the tokens, s [K, T/128]."""

    def copies(refs, row, col):
        tokens = pl.ds(col, BLOCK)
        return [refs[0].at[tokens, pl.ds(row, ROWS)], refs[1].at[row // BLOCK, tokens]]

    def value(buffers):
        """Bytes cannot be read transposed into this layout: dequantise into shared memory, read that transposed."""
        q_s, scale_s, x_s = buffers
        x_s[...] = _registers(q_s) * _over(scale_s[...], q_s.shape, 0)
        plgpu.commit_smem()
        return _registers(x_s.T)

    source = _Source(
        operands=[pad_last2(q, (BLOCK, BLOCK)), pad_last2(q_scale.T, (1, BLOCK))],
        buffers=[
            _buffer(BLOCK, ROWS, E4M3),
            plgpu.SMEM((BLOCK,), jnp.float32),
            _buffer(BLOCK, ROWS, jnp.float32),
        ],
        copies=copies,
        value=value,
        num_copies=2,
    )
    return _cut(source, q.shape[::-1], scale)


def _column_tiles(x: jax.Array, scale: str) -> list[jax.Array]:
    """x [M, K] in 128x1 tiles: q [M, K], s [M/128, K]. The tile is read twice from shared memory, once transposed."""
    m, k = x.shape

    def body(x_g, q_g, s_g, x_s, q_s, s_s, loaded):
        mi, ki = lax.axis_index("rows"), lax.axis_index("cols")
        rows, cols = pl.ds(mi * BLOCK, BLOCK), pl.ds(ki * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(x_g.at[rows, cols], x_s, loaded)
        plgpu.barrier_wait(loaded)
        s_s[...] = scale_from_amax(_row_amax(_registers(x_s.T)), scale)
        plgpu.commit_smem()
        y = _registers(x_s)
        q_s[...] = divide(y, _over(s_s[...], y.shape, 1)).astype(E4M3)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, q_g.at[rows, cols])
        plgpu.copy_smem_to_gmem(s_s, s_g.at[mi, cols])
        plgpu.wait_smem_to_gmem(0)

    tile = (BLOCK, ROWS)
    return _launch(body, [x], [_buffer(*tile, x.dtype)], (m, k), tile, (m // BLOCK, k))


def _square_blocks(x: jax.Array, scale: str) -> list[jax.Array]:
    """x [M, K] in 128x128 blocks: q [M, K], s [M/128, K/128]. Row scales meet in shared memory."""
    m, k = x.shape

    def body(x_g, q_g, s_g, x_s, q_s, s_s, loaded):
        mi, ki = lax.axis_index("rows"), lax.axis_index("cols")
        rows, cols = pl.ds(mi * BLOCK, BLOCK), pl.ds(ki * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(x_g.at[rows, cols], x_s, loaded)
        plgpu.barrier_wait(loaded)
        y = _registers(x_s)
        s_s[...] = scale_from_amax(_row_amax(y), scale)  # grows with amax: the block's is the rows' largest
        plgpu.commit_smem()
        s = jnp.max(plgpu.layout_cast(s_s[...], plgpu.Layout.WG_STRIDED((BLOCK,), 1)))
        q_s[...] = divide(y, lax.broadcast_in_dim(s, y.shape, ())).astype(E4M3)
        s_g[mi, ki] = s
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, q_g.at[rows, cols])
        plgpu.wait_smem_to_gmem(0)

    tile = (BLOCK, BLOCK)
    return _launch(body, [x], [_buffer(*tile, x.dtype)], (m, k), tile, (m // BLOCK, k // BLOCK))

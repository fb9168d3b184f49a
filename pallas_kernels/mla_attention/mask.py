"""Which pairs of a tile's rows and a visited block's columns are visible."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import load_global
from pallas_kernels.mla_attention.warpgroups import ROWS, Tile, along_columns, along_rows

ROW_VALUES, COLUMN_VALUES = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Mask(NamedTuple):
    """Causality and segments.

    Attributes:
      block: columns per visited block.
      keys: number of keys, without padding.
      offset_ref: int32 [B], position of the first query; None for 0.
      segments_ref: int32 [B, padded T], or None.
      positions_ref: int32 [T], 0, 1, 2...: given where rows are keys and columns queries, in the kernel that has no
        register to keep a position per column in.
    """

    block: int
    keys: int
    offset_ref: Any = None
    segments_ref: Any = None
    positions_ref: Any = None

    def hide(self, tile: Tile, i: Any, x: jax.Array, hidden: float) -> jax.Array:
        """Replaces what is not visible of x [64, block]: the calling consumer's rows against block `i`."""
        hide = lambda x: jnp.where(self._visible(tile, i), x, hidden)  # noqa: E731
        return lax.cond(tile.masked(i), hide, lambda x: x, x)

    def _visible(self, tile: Tile, i: Any) -> jax.Array:
        shape, first_row, first_column = (ROWS, self.block), tile.own_rows.start, i * self.block
        # Compared with a value of its row: what a loop keeps for it is one register per column, none per pair.
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW_VALUES)
        if self.positions_ref is not None:
            column = load_global(self.positions_ref.at[pl.ds(first_column, self.block)], COLUMN_VALUES)
            visible = along_columns(column, shape) >= along_rows(row + first_row, shape)
        else:
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
            offset = 0 if self.offset_ref is None else self.offset_ref[tile.batch]
            visible = column <= along_rows(row + (first_row - first_column + offset), shape)
            if self.keys % self.block:
                visible &= column < self.keys - first_column
        if self.segments_ref is None:
            return visible
        own = self._segments(tile, first_row, ROWS, ROW_VALUES)
        other = self._segments(tile, first_column, self.block, COLUMN_VALUES)
        return visible & (along_rows(own, shape) == along_columns(other, shape))

    def _segments(self, tile: Tile, first: Any, length: int, layout: Any) -> jax.Array:
        return load_global(self.segments_ref.at[tile.batch, pl.ds(first, length)], layout)

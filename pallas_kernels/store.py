"""How a warpgroup writes its part of an output tile: through a buffer in shared memory, by TMA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import load_global, swizzled
from pallas_kernels.tiles import COMPUTE_WARPGROUPS, WGMMA_ROWS, Share, Tile, TileConfig


@dataclasses.dataclass(frozen=True)
class Store:
    """References inside of a kernel.

    Attributes:
      config, share: which part of a tile is this warpgroup's.
      out: the output.
      buffer: [64, columns] in shared memory.
      ids: group of each row, or None; rows of padding (-1) are written as zeros.
      addend: array of the output's shape and type that is added, or None.
      arrived: barrier of the addend.
    """

    config: TileConfig
    share: Share
    out: Any
    buffer: Any
    ids: Any
    addend: Any
    arrived: Any

    @staticmethod
    def scratch(config: TileConfig, dtype: Any) -> list[Any]:
        """Returns what the kernel allocates: a `buffer` and an `arrived` for each warpgroup."""
        columns = _columns(config)
        transforms = swizzled(dtype, min(columns, 128 // jnp.dtype(dtype).itemsize))
        return [
            plgpu.SMEM((COMPUTE_WARPGROUPS, WGMMA_ROWS, columns), dtype, transforms=transforms),
            plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        ]

    def begin(self, tile: Tile) -> None:
        """Fetches the first columns of the addend while the tile is computed."""
        if self.addend is not None:
            self._fetch(tile, self.share.slabs()[0], self._column_ranges()[0])

    def __call__(self, tile: Tile, accs: list[jax.Array]) -> None:
        """Writes accs, float32 [64, columns of the share] for each slab."""
        for i, (slab, acc) in enumerate(zip(self.share.slabs(), accs, strict=True)):
            if self.ids is not None:
                acc = self._without_padding(tile, slab, acc)
            for j, columns in enumerate(self._column_ranges()):
                piece = acc[:, j * columns.size : (j + 1) * columns.size]
                self._write(tile, slab, columns, piece, fetched=i == j == 0)

    def _column_ranges(self) -> list[Any]:
        width = _columns(self.config)
        return [pl.ds(self.share.cols.start + c, width) for c in range(0, self.share.num_cols, width)]

    def _fetch(self, tile: Tile, slab: Any, columns: Any) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous store must have read the buffer
        plgpu.copy_gmem_to_smem(tile.of(self.addend).at[slab, columns], self.buffer, self.arrived)

    def _write(self, tile: Tile, slab: Any, columns: Any, piece: jax.Array, fetched: bool) -> None:
        if self.addend is None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        else:
            if not fetched:
                self._fetch(tile, slab, columns)
            plgpu.barrier_wait(self.arrived)
            piece = piece + self.buffer[...].astype(jnp.float32)
        self.buffer[...] = piece.astype(self.out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.buffer, tile.of(self.out).at[slab, columns])

    def _without_padding(self, tile: Tile, slab: Any, acc: jax.Array) -> jax.Array:
        first = tile.mi * self.config.tile_m + slab.start
        ids = load_global(self.ids.at[pl.ds(first, WGMMA_ROWS)], plgpu.Layout.WGMMA.reduce(1))
        return jnp.where(lax.broadcast_in_dim(ids, acc.shape, (0,)) >= 0, acc, 0.0)


def _columns(config: TileConfig) -> int:
    """Returns how many columns a warpgroup stores at a time."""
    cols = config.tile_n if config.tile_m > WGMMA_ROWS else config.tile_n // COMPUTE_WARPGROUPS
    return min(cols, config.store_n)

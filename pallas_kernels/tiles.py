"""Output tiles of the GEMM kernels: how large they are, and which part of one a warpgroup computes.

Legend: M, N output dims, g group (expert).
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.blocks import cdiv, round_up
from pallas_kernels.compat import num_sms

COMPUTE_WARPGROUPS = 2
WGMMA_ROWS = 64

_left = contextvars.ContextVar("SMs left to others", default=0)


@contextlib.contextmanager
def leave_sms(count: int) -> Iterator[None]:
    """GEMM kernels traced inside leave `count` SMs to what runs beside them: a kernel that holds every SM until its end
    lets no collective start, whose channels are thread blocks, too."""
    token = _left.set(count)
    try:
        yield
    finally:
        _left.reset(token)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tiling of one kernel.

    Attributes:
      tile_m, tile_n: output tile of a thread block.
      stages: steps of the contraction in flight.
      snake: width, in tiles along N, of the band that the tiles walk in for L2 reuse.
      cluster: thread blocks, neighbours along N, that load each tile of `a` once for all of them (TMA multicast).
      num_sms: thread blocks in flight, one per SM; None: as many as the device has, but for those left by `leave_sms`.
      store_n: columns that a warpgroup stores at a time, through a buffer of so many.
      split_k: parts of the contraction that different thread blocks compute (dense FP8 products); XLA adds them up.
    """

    tile_m: int = 128
    tile_n: int = 128
    stages: int = 4
    snake: int = 8
    num_sms: int | None = None
    cluster: int = 1
    store_n: int = 128
    split_k: int = 1

    def __post_init__(self):
        if self.cluster not in (1, 2) or (self.num_sms or 0) % self.cluster:
            raise ValueError(
                f"cluster={self.cluster} with num_sms={self.num_sms}: must be 1 or 2 and divide it"
            )
        if self.tile_m not in (64, 128, 256) or self.tile_n not in (64, 128, 256):
            raise ValueError(f"tile {self.tile_m} x {self.tile_n}: both extents must be 64, 128 or 256")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: a pipeline needs at least 2")

    def placed(self) -> "TileConfig":
        """Returns the configuration with the number of thread blocks filled in."""
        if self.num_sms is not None:
            return self
        free = max(num_sms() - _left.get(), self.cluster)
        return dataclasses.replace(self, num_sms=free // self.cluster * self.cluster)

    @property
    def num_clusters(self) -> int:
        assert self.num_sms is not None, "not placed"
        return self.num_sms // self.cluster


def tile_columns(n: int) -> int:
    """Returns the width of the tiles of `n` columns (or height of those of `n` rows): 128, or 64 where that pads less."""
    return 128 if round_up(n, 64) % 128 == 0 else 64


def pair(n: int, tile_n: int) -> int:
    """Returns the cluster of a product with `n` columns: 2 where its tiles, padded to whole ones, pair up along N."""
    return 2 if cdiv(n, tile_n) % 2 == 0 else 1


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of a tile that the calling warpgroup computes, relative to the tile."""

    rows: Any
    cols: Any
    num_rows: int
    num_cols: int

    @classmethod
    def of(cls, config: TileConfig) -> "Share":
        """Takes half of the rows, or of the columns where the tile is only one wgmma high."""
        wg = lax.axis_index("wg")
        if config.tile_m > WGMMA_ROWS:
            rows = config.tile_m // COMPUTE_WARPGROUPS
            return cls(pl.ds(wg * rows, rows), pl.ds(0, config.tile_n), rows, config.tile_n)
        cols = config.tile_n // COMPUTE_WARPGROUPS
        return cls(pl.ds(0, config.tile_m), pl.ds(wg * cols, cols), config.tile_m, cols)

    def slabs(self) -> list[Any]:
        """Returns row ranges of one wgmma each: accumulators of 64 rows keep the register demand in bounds."""
        return [pl.ds(self.rows.start + r, WGMMA_ROWS) for r in range(0, self.num_rows, WGMMA_ROWS)]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Position of an output tile: its group (0 where there are none) and its block indices along M and N."""

    g: Any
    mi: Any
    ni: Any
    config: TileConfig

    @property
    def ms(self):
        return pl.ds(self.mi * self.config.tile_m, self.config.tile_m)

    @property
    def ns(self):
        return pl.ds(self.ni * self.config.tile_n, self.config.tile_n)

    def of(self, ref):
        """Returns this tile of an array [M, N] or [G, M, N]."""
        return ref.at[self.ms, self.ns] if len(ref.shape) == 2 else ref.at[self.g, self.ms, self.ns]

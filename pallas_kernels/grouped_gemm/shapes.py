"""Tile configurations of the BF16 grouped GEMM; its named shapes are those of the FP8 one."""

from pallas_kernels.fp8_grouped_gemm.shapes import SHAPES
from pallas_kernels.matmul import TileConfig, tile_columns

__all__ = ["SHAPES", "gemm_config", "wgrad_config"]


def gemm_config(alignment: int, n: int) -> TileConfig:
    """Tile configuration of the m-grouped product."""
    return TileConfig(tile_m=64 if alignment % 128 else 128, tile_n=tile_columns(n), stages=5)


def wgrad_config(m: int, n: int) -> TileConfig:
    """Tile configuration of the k-grouped product. Two warpgroups divide a tile, and 32 columns of tokens x channels
    are half a swizzle: one side has 128."""
    tile_m, tile_n = tile_columns(m), tile_columns(n)
    return TileConfig(tile_m=tile_m if tile_n == 128 else 128, tile_n=tile_n, stages=5)

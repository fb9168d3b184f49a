"""Shapes and tile configurations of the BF16 grouped GEMM. The gradient of gate and up is one product, of which each weight
takes half."""

from pallas_kernels.blocks import BLOCK
from pallas_kernels.fp8_grouped_gemm import shapes as fp8
from pallas_kernels.fp8_grouped_gemm.shapes import GroupedShape
from pallas_kernels.tiles import TileConfig, pair, tile_columns

WIDE = 256  # columns of a tile that two warpgroups of 64 x 256 accumulate in 128 registers per thread

SHAPES = (
    *(shape for shape in fp8.SHAPES if shape.kind == "contiguous"),
    GroupedShape("gate_up_wgrad_4x8192", "wgrad", 4, 7168, 4096, 8192),
    GroupedShape("down_wgrad_4x8192", "wgrad", 4, 2048, 7168, 8192),
)


def gemm_config(alignment: int, n: int) -> TileConfig:
    """Tile configuration of the m-grouped product.

    A step of 128 x 256 reads 48 KB for 4.2 MFLOP, or 40 KB where a pair of thread blocks shares the rows; two tiles of
    128 x 128 read 64 KB, at the 600 TFLOPS they reached more than 9 TB/s, about what L2 gives: by this count, no
    profile, they were bound by it. In shared memory a wgmma of 256 columns reads 80 bytes per cycle, not 96, of 128.
    """
    tile_m = 64 if alignment % BLOCK else BLOCK
    if tile_m == BLOCK and n % WIDE == 0:
        return TileConfig(tile_m, WIDE, stages=4, cluster=pair(n, WIDE))
    tile_n = tile_columns(n)
    return TileConfig(tile_m, tile_n, stages=5, cluster=pair(n, tile_n))


def wgrad_config(m: int, n: int) -> TileConfig:
    """Tile configuration of the k-grouped product. Two warpgroups divide a tile, and 32 columns of tokens x channels
    are half a swizzle: one side has 128. The output is float32: half as many columns fit the buffer for stores."""
    tile_m, tile_n = tile_columns(m), tile_columns(n)
    if tile_m == BLOCK and n % WIDE == 0:
        return TileConfig(tile_m, WIDE, stages=4, cluster=pair(n, WIDE), store_n=64)
    return TileConfig(tile_m if tile_n == BLOCK else BLOCK, tile_n, stages=5, cluster=pair(n, tile_n))

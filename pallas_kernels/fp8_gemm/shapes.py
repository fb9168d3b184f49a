"""Shapes of DeepSeek-V3's dense FP8 GEMMs and the tile configuration of each.

Every configuration listed compiles for H100 with FP8 wgmma, no spill and no serialised wgmma
(tests/kernels/test_kernels_h100_compile.py).
"""

import dataclasses

from pallas_kernels.blocks import cdiv
from pallas_kernels.matmul import TileConfig, tile_columns


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """out [m, n] = a [m, k] @ b [n, k].T; `recipe` is "1d2d" (fprop, dgrad) or "1d1d" (wgrad)."""

    name: str
    m: int
    n: int
    k: int
    recipe: str = "1d2d"
    accumulate: bool = False
    peer_tflops: float | None = None  # DeepGEMM on one H800, as published by its authors

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        out = 4 * (2 if self.accumulate else 1) if self.recipe == "1d1d" else 2
        return (self.m + self.n) * self.k + self.m * self.n * out


FPROP = (
    ("q_a_kv_a", 2112, 7168, {64: 206, 128: 352, 4096: 1058}),
    ("q_b", 24576, 1536, {64: 289, 128: 535, 4096: 1125}),
    ("kv_b", 32768, 512, {64: 219, 128: 358, 4096: 751}),
    ("o", 7168, 16384, {64: 336, 128: 645, 4096: 1426}),
    ("shared_gate_up", 4096, 7168, {64: 287, 128: 533, 4096: 1304}),
    ("shared_down", 7168, 2048, {64: 295, 128: 510, 4096: 1168}),
)
WGRAD = (("q_a_kv_a", 7168, 2112, 920), ("q_b", 1536, 24576, 986), ("o", 16384, 7168, 994))

SHAPES = (
    *(
        GemmShape(f"{name}_m{m}", m, n, k, peer_tflops=tflops)
        for name, n, k, by_m in FPROP
        for m, tflops in by_m.items()
    ),
    *(GemmShape(f"{name}_wgrad", m, n, 4096, "1d1d", True, tflops) for name, m, n, tflops in WGRAD),
)


def tile_config(m: int, n: int, k: int, recipe: str = "1d2d") -> TileConfig:
    """Tile configuration for a product of any extents.

    With many rows the tiles of a are fetched once per pair of thread blocks: a 128 x 128 tile alone reads 32 KB for
    each 4.2 MFLOP, at 1,300 TFLOPS more than 10 TB/s, which the L2 cache does not give.
    """
    tile_n = tile_columns(n)
    if m <= 64:
        return TileConfig(tile_m=64, tile_n=tile_n, stages=6)
    pair = recipe == "1d2d" and m > 512 and cdiv(n, tile_n) % 2 == 0
    return TileConfig(tile_m=128, tile_n=tile_n, stages=4, cluster=2 if pair else 1)

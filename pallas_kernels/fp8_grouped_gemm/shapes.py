"""Shapes of DeepSeek-V3's routed experts in FP8 and the tile configuration of each.

Every configuration listed compiles for H100 with FP8 wgmma, no spill and no serialised wgmma
(tests/kernels/test_kernels_h100_compile.py).
"""

import dataclasses

from pallas_kernels.tiles import TileConfig, pair, tile_columns


@dataclasses.dataclass(frozen=True)
class GroupedShape:
    """A product of groups of rows; `accumulate`: added to a sum. `kind` "contiguous": out [groups * m, n], contraction k per group of m rows. "masked": out [groups, m, n] of
    which `rows` per group are present. "wgrad": out [groups, m, n], contraction k per group."""

    name: str
    kind: str
    groups: int
    m: int
    n: int
    k: int
    rows: int | None = None
    peer_tflops: float | None = None  # DeepGEMM on one H800, as published by its authors
    accumulate: bool = False

    @property
    def present_rows(self) -> int:
        return self.m if self.rows is None else self.rows

    @property
    def is_fprop(self) -> bool:
        return self.kind != "wgrad" and "dgrad" not in self.name

    @property
    def flops(self) -> int:
        return 2 * self.groups * self.present_rows * self.n * self.k

    def bytes(self, element: int = 1) -> int:
        """Counts bytes moved at least once, with `element` bytes per operand element."""
        rows, out = self.present_rows, 4 * (1 + self.accumulate) if self.kind == "wgrad" else 2
        return self.groups * (element * (rows + self.n) * self.k + out * rows * self.n)


SHAPES = (
    # Training on 64 devices: each has 4 experts, and 4096 tokens with 8 experts each.
    GroupedShape("gate_up_4x8192", "contiguous", 4, 8192, 4096, 7168, peer_tflops=1346),
    GroupedShape("down_4x8192", "contiguous", 4, 8192, 7168, 2048, peer_tflops=1214),
    GroupedShape("gate_up_dgrad_4x8192", "contiguous", 4, 8192, 7168, 4096),
    GroupedShape("down_dgrad_4x8192", "contiguous", 4, 8192, 2048, 7168),
    GroupedShape("gate_wgrad_4x8192", "wgrad", 4, 7168, 2048, 8192, accumulate=True),
    GroupedShape("down_wgrad_4x8192", "wgrad", 4, 2048, 7168, 8192, accumulate=True, peer_tflops=1033),
    # Prefill on 32 devices.
    GroupedShape("gate_up_8x4096", "contiguous", 8, 4096, 4096, 7168, peer_tflops=1346),
    GroupedShape("down_8x4096", "contiguous", 8, 4096, 7168, 2048, peer_tflops=1214),
    # Decoding: 128 tokens of each of 64 devices; and many groups of few rows.
    GroupedShape("gate_up_decode_4x256", "masked", 4, 256, 4096, 7168, 256, 932),
    GroupedShape("down_decode_4x256", "masked", 4, 256, 7168, 2048, 256, 815),
    GroupedShape("gate_up_decode_32x192", "masked", 32, 4096, 4096, 7168, 192),
)


def gemm_config(alignment: int, n: int) -> TileConfig:
    """Tile configuration of the m-grouped product. Neighbours along N belong to one group and share the rows."""
    tile_n = tile_columns(n)
    return TileConfig(64 if alignment % 128 else 128, tile_n, stages=4, cluster=pair(n, tile_n))


def masked_config(n: int) -> TileConfig:
    """Tile configuration of the masked product. Tiles of 64 rows compute few that are absent; with 256 columns, 128 for each
    warpgroup, they multiply in the same instructions as tiles of 128 x 128."""
    tile_n = 256 if n % 256 == 0 else tile_columns(n)
    return TileConfig(64, tile_n, stages=4, cluster=pair(n, tile_n))


def wgrad_config(m: int, n: int) -> TileConfig:
    """Tile configuration of the k-grouped product."""
    tile_n = tile_columns(n)
    return TileConfig(tile_columns(m), tile_n, stages=4, cluster=pair(n, tile_n))

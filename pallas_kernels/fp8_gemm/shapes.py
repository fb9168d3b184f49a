"""Shapes of DeepSeek-V3's dense FP8 GEMMs and the tile configuration of each.

Every configuration listed compiles for H100 with FP8 wgmma, no spill and no serialised wgmma
(tests/kernels/test_kernels_h100_compile.py).
"""

import dataclasses
from typing import Any

from pallas_kernels.blocks import BLOCK, cdiv
from pallas_kernels.compat import num_sms
from pallas_kernels.tiles import TileConfig, pair, tile_columns


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


FEW_ROWS = 128  # one tile of rows
MIN_STEPS = 12  # of a part of a split contraction: fewer take less time than adding the parts up

# The linear layers: name, outputs, inputs. Weights of one input are one product, but for their gradients, each of which is
# added to the sum over micro-batches where that lies.
LAYERS = (
    ("q_a_kv_a", 2112, 7168),
    ("q_b", 24576, 1536),
    ("kv_b", 32768, 512),
    ("o", 7168, 16384),
    ("dense_gate_up", 36864, 7168),
    ("dense_down", 7168, 18432),
    ("shared_gate_up", 4096, 7168),
    ("shared_down", 7168, 2048),
)
WEIGHTS = {
    "q_a_kv_a": (("q_a", 1536), ("kv_a", 576)),
    "dense_gate_up": (("dense_gate", 18432),),
    "shared_gate_up": (("shared_gate", 2048),),
}
TOKENS, DECODED = 4096, (64, 128)  # of a device in training; sequences in decoding
# DeepGEMM on one H800, as published by its authors, by rows; at "wgrad" of the weight gradient
PUBLISHED: dict[str, dict[Any, float]] = {
    "q_a_kv_a": {64: 206, 128: 352, 4096: 1058},
    "q_b": {64: 289, 128: 535, 4096: 1125, "wgrad": 986},
    "kv_b": {4096: 751},
    "o": {64: 336, 128: 645, 4096: 1426, "wgrad": 994},
    "shared_gate_up": {64: 287, 128: 533, 4096: 1304},
    "shared_down": {64: 295, 128: 510, 4096: 1168},
}


def _shapes(name: str, n: int, k: int) -> list[GemmShape]:
    """Of a layer in training, then in decoding, which absorbs kv_b into queries and outputs."""
    published = PUBLISHED.get(name, {})
    decoded = () if name == "kv_b" else DECODED
    return [
        GemmShape(f"{name}_m{TOKENS}", TOKENS, n, k, peer_tflops=published.get(TOKENS)),
        GemmShape(f"{name}_dgrad", TOKENS, k, n),
        *(
            GemmShape(f"{weight}_wgrad", k, width, TOKENS, "1d1d", True, published.get("wgrad"))
            for weight, width in WEIGHTS.get(name, ((name, n),))
        ),
        *(GemmShape(f"{name}_m{m}", m, n, k, peer_tflops=published.get(m)) for m in decoded),
    ]


SHAPES = tuple(shape for layer in LAYERS for shape in _shapes(*layer))


def tile_config(m: int, n: int, k: int) -> TileConfig:
    """Tile configuration for a product of any extents.

    With many rows the tiles of a are fetched once per pair of thread blocks: a 128 x 128 tile alone reads 32 KB for
    each 4.2 MFLOP, at 1,300 TFLOPS more than 10 TB/s, which the L2 cache does not give. With few rows the tiles are too
    few for the SMs, and each takes K / 128 steps one after the other: K is split among them.
    """
    tile_n = tile_columns(n)
    if m > FEW_ROWS:
        return TileConfig(128, tile_n, stages=4, cluster=pair(n, tile_n) if m > 512 else 1)
    split_k = _parts(cdiv(n, tile_n), cdiv(k, BLOCK))
    if m <= 64:
        return TileConfig(64, tile_n, stages=6, split_k=split_k)
    return TileConfig(128, tile_n, stages=4, split_k=split_k)


def _parts(tiles: int, steps: int) -> int:
    """Returns into how many parts of at least 12 steps the contraction is split, all of which one wave of SMs takes."""
    fitting = (p for p in range(2, steps // MIN_STEPS + 1) if steps % p == 0 and tiles * p <= num_sms())
    return max(fitting, default=1)

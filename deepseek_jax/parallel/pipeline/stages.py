"""Which layers a stage of the pipeline has, and which each rank holds (report section 3.2.1).

A stage is a run of layers; a rank is an index along the mesh axis `pipe`; a chunk is a stage that a rank holds. With two
chunks, chunk 0 is the lower of the two stages: of DualPipe over P ranks r and P-1-r, which every stage's copies at both
ranks share, of DualPipeV over R ranks r and 2R-1-r.

One program runs on all ranks, so all have as many *slots* for layers of a kind; what a rank has no layer for is empty.
"""

import dataclasses
import functools
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from deepseek_jax.config import ModelConfig

# Parameters of layers of one kind -> the field of `Stage` that says which.
KINDS = MappingProxyType({"dense_layers": "dense", "moe_layers": "moe"})


class Stage(NamedTuple):
    """dense, moe: numbers in `params["dense_layers"]` and `params["moe_layers"]`, from 0 each; there may be none.
    first: begins with the embedding; last: ends with final norm, MTP modules and head."""

    dense: range
    moe: range
    first: bool
    last: bool


class Content(NamedTuple):
    """What a program needs to know of a stage: how many layers of each kind, and whether it has the ends."""

    dense: int
    moe: int
    first: bool
    last: bool


# --- the split ----------------------------------------------------------------------------------------------------


@functools.cache
def _flops(cfg: ModelConfig, dense: bool) -> tuple[float, float]:
    """Training FLOPs per token of a layer of a kind, and of the head, at the model's full length."""

    def model(layers: int) -> float:
        first = layers if dense else 0
        only = dataclasses.replace(
            cfg, num_hidden_layers=layers, first_k_dense_replace=first, num_nextn_predict_layers=0
        )
        return only.flops_per_token(cfg.max_position_embeddings)

    layer = model(2) - model(1)
    return layer, model(1) - layer


def costs(cfg: ModelConfig) -> tuple[list[float], float]:
    """Training FLOPs per token of each layer, and of what follows the last one: head, MTP modules with theirs."""
    dense, head = _flops(cfg, True) if cfg.first_k_dense_replace else (0.0, 0.0)
    moe = 0.0
    if cfg.num_moe_layers or cfg.num_nextn_predict_layers:
        moe, head = _flops(cfg, False)
    module = moe + 6 * 2 * cfg.hidden_size**2 + head
    layers = [dense] * cfg.first_k_dense_replace + [moe] * cfg.num_moe_layers
    return layers, head + cfg.num_nextn_predict_layers * module


@functools.cache
def _split(cfg: ModelConfig, n: int) -> tuple[int, ...]:
    """How many layers each of `n` stages gets: the largest stage is as small as can be, then both ends have as few
    layers as can be, then the squares add up to the least."""
    layers, last = costs(cfg)
    before = np.concatenate([[0.0], np.cumsum(layers)])
    length = np.arange(len(before)) - np.arange(len(before))[:, None]  # of a stage [from layer, to layer]
    run = np.where(length >= 0, before - before[:, None], np.inf)
    stage_costs = [run] * (n - 1) + [run + last]
    start = np.where(np.arange(len(before)) == 0, 0.0, np.inf)
    largest = functools.reduce(lambda x, stage: np.maximum(x[:, None], stage).min(0), stage_costs, start)[-1]
    reached, first_layers = start, []
    for i, stage in enumerate(stage_costs):
        ends = length * (before[-1] + last) ** 2 if i in (0, n - 1) else 0.0
        total = reached[:, None] + np.where(stage <= largest, stage**2 + ends, np.inf)
        first_layers.append(total.argmin(0))
        reached = total.min(0)
    counts, stop = [], len(layers)
    for first in reversed(first_layers):
        counts.append(int(stop - first[stop]))
        stop = first[stop]
    return tuple(reversed(counts))


def stages(cfg: ModelConfig, n: int, layers: Sequence[int] = ()) -> tuple[Stage, ...]:
    """The `n` stages of a model, consecutive layers each; a stage may have none.

    layers: how many each stage gets; none given: so that the stages cost about alike, in FLOPs, where the embedding costs
    nothing and the last stage has the head and the MTP modules besides. DeepSeek-V3, whose end costs as much as 3.9
    layers, gets over 16 stages four layers each, the last one.

    Raises ValueError if `layers` are not `n` numbers that add up to the model's.
    """
    if layers and (len(layers) != n or sum(layers) != cfg.num_hidden_layers or min(layers) < 0):
        raise ValueError(
            f"mesh.stage_layers={tuple(layers)}: {len(layers)} stages of {sum(layers)} layers in all, and the model has "
            f"{cfg.num_hidden_layers} layers on {n} stages; give {n} numbers >= 0 that add up to "
            f"{cfg.num_hidden_layers}, or () for a split by cost"
        )
    stop = np.cumsum([0, *(layers or _split(cfg, n))]).tolist()
    dense = cfg.first_k_dense_replace
    return tuple(
        Stage(
            range(min(stop[i], dense), min(stop[i + 1], dense)),
            range(max(stop[i] - dense, 0), max(stop[i + 1] - dense, 0)),
            i == 0,
            i == n - 1,
        )
        for i in range(n)
    )


# --- what a rank holds --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Held:
    """Which stage, and which layers in which slots, each of `num_ranks` ranks holds in each chunk.

    chunks: 1 for a stage per rank; 2 with as many stages as ranks, which are then even, for DualPipe, with twice as many
    for DualPipeV. Raises ValueError for other numbers.
    """

    stages: tuple[Stage, ...]
    num_ranks: int
    chunks: int = 1

    def __post_init__(self):
        n, ranks = len(self.stages), self.num_ranks
        both_ways = n == ranks and ranks % 2 == 0
        if not (n == ranks if self.chunks == 1 else self.chunks == 2 and (both_ways or n == 2 * ranks)):
            raise ValueError(
                f"{n} stages in {self.chunks} chunks per rank do not fit mesh.pipe={ranks}: one chunk takes "
                f"{ranks} stages, two take {2 * ranks}, or {ranks} both ways if that is even; change config.mesh.pipe"
            )

    def stage_number(self, rank: int, chunk: int) -> int:
        """Which stage is chunk `chunk` of rank `rank`."""
        other = len(self.stages) - 1 - rank
        return (rank, other)[chunk] if self.chunks == 1 or rank < other else (other, rank)[chunk]

    def stage(self, rank: int, chunk: int) -> Stage:
        return self.stages[self.stage_number(rank, chunk)]

    def numbers(self, kind: str, rank: int, chunk: int) -> range:
        """Which of the layers `params[kind]` a rank holds in a chunk."""
        return getattr(self.stage(rank, chunk), KINDS[kind])

    @functools.cached_property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """Of each kind, slots per chunk: as many as the rank with the most layers needs."""
        ranks = range(self.num_ranks)
        return {
            kind: tuple(max(len(self.numbers(kind, r, c)) for r in ranks) for c in range(self.chunks))
            for kind in KINDS
        }

    def chunk_slots(self, kind: str, chunk: int) -> slice:
        """Which of a rank's slots of a kind are those of a chunk; the first of them are filled, by layer."""
        start = sum(self.slots[kind][:chunk])
        return slice(start, start + self.slots[kind][chunk])

    @functools.cached_property
    def layers(self) -> dict[str, np.ndarray]:
        """Of each kind int32 [rank, slot]: which layer is in the slot, -1 in an empty one."""
        tables = {kind: np.full((self.num_ranks, sum(n)), -1, np.int32) for kind, n in self.slots.items()}
        for kind, table in tables.items():
            for rank in range(self.num_ranks):
                for chunk in range(self.chunks):
                    numbers, first = self.numbers(kind, rank, chunk), self.chunk_slots(kind, chunk).start
                    table[rank, first : first + len(numbers)] = numbers
        return tables

    def content(self, rank: int, chunk: int) -> Content:
        dense, moe, first, last = self.stage(rank, chunk)
        return Content(len(dense), len(moe), first, last)

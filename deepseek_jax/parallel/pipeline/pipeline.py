"""The pipeline of a run: its schedule and what each rank holds, from the config and the sizes of the mesh; in words, too."""

import dataclasses
import functools
import math
from collections.abc import Mapping

from deepseek_jax.checks import named, require
from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import BATCH_AXES, PIPE
from deepseek_jax.parallel.pipeline.ops import Schedule
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES, forward_only
from deepseek_jax.parallel.pipeline.stages import Held, Stage, stages
from deepseek_jax.parallel.pipeline.ticks import Table, table

_MOST = 4  # micro-batches per rank, where the config leaves their number open


@functools.lru_cache(64)
def _schedule(name: str, ranks: int, micro: int, queue: int | None) -> Schedule:
    return SCHEDULES[name](ranks, micro, queue=queue)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """name: of the schedule; micro: micro-batches of a step on each device."""

    name: str
    ranks: int
    micro: int
    weight_queue: int | None  # None: as the schedule has it
    held: Held

    def training(self) -> Table:
        return table(_schedule(self.name, self.ranks, self.micro, self.weight_queue))

    def forwards(self, micro: int) -> Table:
        """Of forward passes alone."""
        return table(forward_only(self.ranks, micro, like=self.name))


def _both_ways(ranks: int, micro: int) -> bool:
    """Whether DualPipe is possible."""
    return ranks % 2 == 0 and micro % 2 == 0 and micro >= 2 * ranks


def _shards(axes: Mapping[str, int]) -> int:
    return math.prod(axes.get(axis, 1) for axis in BATCH_AXES)


def _micro(cfg: Config, axes: Mapping[str, int], ranks: int) -> int:
    """How many micro-batches each device's sequences make."""
    if cfg.train.grad_accumulation > 1:
        return cfg.train.grad_accumulation
    rows = max(1, cfg.train.batch_size // _shards(axes))
    numbers = [n for n in range(1, min(rows, _MOST * ranks) + 1) if rows % n == 0]
    return max(numbers, key=lambda n: (_both_ways(ranks, n), n))


def pipeline_over(cfg: Config, axes: Mapping[str, int]) -> Pipeline | None:
    """The pipeline on a mesh with these axes; None without one.

    With `train.grad_accumulation=1`, the micro-batches are as small as can be, a sequence each, but at most 4 per rank.
    Raises ValueError for a schedule that does not fit the numbers, and for a schedule or stages without a pipeline.
    """
    ranks, mesh = axes.get(PIPE, 1), cfg.mesh
    if ranks == 1:
        alone = {
            "stage_layers": mesh.stage_layers or None,
            "schedule": None if mesh.schedule == "auto" else mesh.schedule,
        }
        for name, value in alone.items():
            require(
                value is None,
                f"mesh.{name}={value} is of a pipeline, and there is none: set mesh.pipe, or leave it out",
            )
        return None
    micro = _micro(cfg, axes, ranks)
    name = mesh.schedule
    if name == "auto":
        name = "dualpipe" if _both_ways(ranks, micro) else "one_f_one_b"
    queue: int | None = mesh.weight_queue
    if queue == -1:
        queue = None if name == "zero_bubble" else 0
    change = (
        f"; mesh.pipe={ranks} with {micro} micro-batches on each device: change train.grad_accumulation, train.batch_size, "
        "mesh.schedule or mesh.pipe"
    )
    with named("", change):
        _schedule(name, ranks, micro, queue)
    chunks = 2 if name in ("dualpipe", "dualpipe_v") else 1
    number = 2 * ranks if name == "dualpipe_v" else ranks
    held = Held(stages(cfg.model, number, mesh.stage_layers), ranks, chunks)
    return Pipeline(name, ranks, micro, queue, held)


# --- in words -----------------------------------------------------------------------------------------------------


def _content(cfg: Config, stage: Stage) -> str:
    """ "embedding, layers 0 to 3", as the layers are numbered in the whole model."""
    dense, mtp = cfg.model.first_k_dense_replace, cfg.model.num_nextn_predict_layers
    numbers = [*stage.dense, *(dense + i for i in stage.moe)]
    layers = "no layer" if not numbers else f"layer {numbers[0]}"
    if len(numbers) > 1:
        layers = f"layers {numbers[0]} to {numbers[-1]}"
    end = ["MTP"] * (mtp > 0) + ["head"]
    return ", ".join(["embedding"] * stage.first + [layers] + end * stage.last)


def described(cfg: Config, axes: Mapping[str, int]) -> list[str]:
    """What a run says of its pipeline: schedule, stages, and what DualPipe would take if it is not possible. Empty without
    a pipeline."""
    pipeline = pipeline_over(cfg, axes)
    if pipeline is None:
        return []
    ranks, micro, shards = pipeline.ranks, pipeline.micro, _shards(axes)
    sequences = cfg.train.batch_size // (shards * micro)
    ways = ", each with two stages" if pipeline.held.chunks == 2 else ""
    lines = [
        f"pipeline: {pipeline.name} over {ranks} ranks{ways}; on each device {micro} micro-batches of {sequences} sequence(s)",
        "  stages: " + " | ".join(_content(cfg, stage) for stage in pipeline.held.stages),
    ]
    if cfg.mesh.schedule == "auto" and pipeline.name != "dualpipe":
        lines.append(f"  not DualPipe, {_for_dualpipe(cfg, ranks, shards * sequences)}")
    return lines


def _for_dualpipe(cfg: Config, ranks: int, sequences: int) -> str:
    """What it would take. sequences: of a micro-batch, over all devices."""
    if ranks % 2:
        return f"which needs an even number of ranks: mesh.pipe={ranks + 1}, for instance"
    keys = f"train.batch_size={2 * ranks * sequences}"
    if cfg.train.grad_accumulation > 1:
        keys = f"train.grad_accumulation={2 * ranks} and {keys}"
    return f"which needs an even number of micro-batches, at least two per rank: {keys}, for instance"

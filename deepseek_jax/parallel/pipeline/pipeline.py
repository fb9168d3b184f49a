"""The pipeline of a run: its schedule and what each rank holds, from the config and the sizes of the mesh."""

import dataclasses
from collections.abc import Mapping

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import BATCH_AXES, PIPE
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES, forward_only
from deepseek_jax.parallel.pipeline.stages import Held, stages
from deepseek_jax.parallel.pipeline.ticks import Table, table

_MOST = 4  # micro-batches per rank, where the config leaves their number open


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """name: of the schedule; micro: micro-batches of a step on each device."""

    name: str
    ranks: int
    micro: int
    weight_queue: int | None  # None: as the schedule has it
    held: Held

    def training(self) -> Table:
        return table(SCHEDULES[self.name](self.ranks, self.micro, queue=self.weight_queue))

    def forwards(self, micro: int) -> Table:
        """Of forward passes alone."""
        return table(forward_only(self.ranks, micro, like=self.name))


def pipeline_over(cfg: Config, axes: Mapping[str, int]) -> Pipeline | None:
    """The pipeline on a mesh with these axes; None without one.

    With `train.grad_accumulation=1`, the micro-batches are as small as can be, a sequence each, but at most 4 per rank.
    Raises ValueError for a schedule that does not fit the numbers.
    """
    ranks = axes.get(PIPE, 1)
    if ranks == 1:
        return None
    micro = cfg.train.grad_accumulation
    if micro == 1:
        shards = 1
        for axis in BATCH_AXES:
            shards *= axes.get(axis, 1)
        rows = max(1, cfg.train.batch_size // shards)
        micro = max(n for n in range(1, min(rows, _MOST * ranks) + 1) if rows % n == 0)
    name = cfg.mesh.schedule
    if name == "auto":
        both_ways = ranks % 2 == 0 and micro % 2 == 0 and micro >= 2 * ranks
        name = "dualpipe" if both_ways else "one_f_one_b"
    queue: int | None = cfg.mesh.weight_queue
    if queue == -1:
        queue = None if name == "zero_bubble" else 0
    try:
        SCHEDULES[name](ranks, micro, queue=queue)
    except ValueError as error:
        raise ValueError(
            f"{error}; mesh.pipe={ranks} with {micro} micro-batches on each device: change train.grad_accumulation, "
            "train.batch_size, mesh.schedule or mesh.pipe"
        ) from None
    chunks = 2 if name in ("dualpipe", "dualpipe_v") else 1
    number = 2 * ranks if name == "dualpipe_v" else ranks
    held = Held(stages(cfg.model, number, cfg.mesh.stage_layers), ranks, chunks)
    return Pipeline(name, ranks, micro, queue, held)

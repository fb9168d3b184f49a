"""A run as the planner sees it: a config on a mesh of GPUs, checked, and the sizes that follow."""

import dataclasses
import functools

from jax.sharding import AbstractMesh

from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.model_config import DTYPE_BYTES
from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.wire import Wire
from deepseek_jax.parallel.layout import layout_over
from deepseek_jax.parallel.mesh import EXPERT_AXES, abstract_mesh, batch_shards, rules
from deepseek_jax.parallel.pipeline.ops import Op
from deepseek_jax.parallel.pipeline.pipeline import Pipeline, pipeline_over
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES
from deepseek_jax.parallel.pipeline.simulate import rows
from deepseek_jax.parallel.pipeline.stages import Stage, stages
from deepseek_jax.parallel.pipeline.ticks import Table, table
from deepseek_jax.precision import preset
from deepseek_jax.training.preflight import granularity
from experiments.planning.hardware import COMM_SMS, Hardware, Link

MOST_PER_RANK = 8  # micro-batches whose schedule is looked at; what more of them take is a straight line
FP8 = 1 + 4 / 128  # bytes of an element in E4M3 with a float32 scale per 128
E5M6 = 1.5


@functools.lru_cache(64)
def table_of(name: str, ranks: int, micros: int, queue: int | None) -> Table:
    return table(SCHEDULES[name](ranks, micros, queue))


@functools.lru_cache(64)
def ticks_of(name: str, ranks: int, micros: int, queue: int | None) -> list[dict[int, Op]]:
    return rows(table_of(name, ranks, micros, queue).schedule)


@dataclasses.dataclass(frozen=True)
class Run:
    """A config on `mesh`, of GPUs `hardware`.

    Raises ValueError, in one line with the numbers, for what does not divide, or does not lie on such machines.
    """

    cfg: Config
    mesh: AbstractMesh
    hardware: Hardware

    def __post_init__(self):
        granularity(self.cfg, self.mesh)
        inside = self.size("local") * self.size("tensor")
        if inside > self.hardware.node:
            raise ValueError(
                f"mesh local={self.size('local')} x tensor={self.size('tensor')} is one node's, and a node has "
                f"{self.hardware.node} {self.hardware.name}; change config.mesh.local or config.mesh.tensor"
            )
        travels = self.wire is not None
        if self.pipeline is None and travels and self.cfg.mesh.overlap and self.sequences % 2:
            raise ValueError(
                f"mesh.overlap=True halves a micro-batch, and a device's has {self.sequences} sequences; change "
                "config.train.grad_accumulation or train.batch_size, or set config.mesh.overlap=False"
            )

    # --- sizes ----------------------------------------------------------------------------------------------------

    def size(self, axis: str) -> int:
        return self.mesh.shape[axis]

    @property
    def model(self) -> ModelConfig:
        return self.cfg.model

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def pipe(self) -> int:
        return self.size("pipe")

    @property
    def micros(self) -> int:
        """Micro-batches of a step."""
        return self.pipeline.micro if self.pipeline else self.cfg.train.grad_accumulation

    @property
    def sequences(self) -> int:
        """Of a micro-batch, of a device (or of those of `tensor`, which share them)."""
        return self.cfg.train.batch_size // (batch_shards(self.mesh) * self.micros)

    @property
    def tokens(self) -> int:
        """A device's own of a micro-batch."""
        return self.sequences * self.cfg.data.seq_len // self.size("tensor")

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.train.batch_size * self.cfg.data.seq_len

    @property
    def expert_devices(self) -> int:
        """Devices over which the experts of a layer are spread."""
        spread = "expert" in rules(self.cfg.mesh, self.mesh)
        return functools.reduce(lambda n, axis: n * self.size(axis), EXPERT_AXES, 1) if spread else 1

    @property
    def experts(self) -> int:
        """Experts of a layer on a device."""
        return self.model.n_routed_experts // self.expert_devices

    @property
    def capacity(self) -> float:
        """Rows for (token, expert) pairs that buffers have, per token."""
        k = self.model.num_experts_per_tok
        if self.wire is None:
            return k
        return self.cfg.mesh.receive or self.expert_devices * min(k, self.experts)

    # --- numbers --------------------------------------------------------------------------------------------------

    @property
    def fp8(self) -> bool:
        return preset(self.cfg.precision) is not None

    @property
    def act(self) -> int:
        """Bytes of an element of an activation."""
        return DTYPE_BYTES[self.model.dtype]

    @property
    def operand(self) -> float:
        """Bytes of an element of a linear layer's operand, as it is kept."""
        return FP8 if self.fp8 else self.act

    @property
    def weight(self) -> float:
        """Bytes of a weight's compute copy: FP8 has an operand of fprop and one of dgrad."""
        return 2 * (1 + 4 / 128**2) if self.fp8 else self.act

    @property
    def gemm(self) -> str:
        """Whose rates linear layers have."""
        return "fp8" if self.fp8 else {2: "bf16", 4: "float32"}[self.act]

    @property
    def comm_sms(self) -> int:
        """SMs that are not there for arithmetic."""
        return COMM_SMS if self.wire is not None and self.cfg.mesh.overlap else 0

    # --- how it runs ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def wire(self) -> Wire | None:
        """Formats of the exchange; None where no tokens travel."""
        dispatcher = layout_over(self.cfg, self.mesh).dispatcher
        return dispatcher.wire if isinstance(dispatcher, Ragged) else None

    @functools.cached_property
    def pipeline(self) -> Pipeline | None:
        return pipeline_over(self.cfg, self.mesh.shape)

    def _numbers(self, per_rank: int) -> tuple[str, int, int, int | None]:
        p = self.pipeline
        assert p is not None
        micro = p.micro if p.name == "gpipe" else min(p.micro, per_rank * p.ranks)
        return p.name, p.ranks, micro, p.weight_queue

    def ticks(self, per_rank: int = MOST_PER_RANK) -> list[dict[int, Op]]:
        """The ops of `table`, tick by tick."""
        return ticks_of(*self._numbers(per_rank))

    def table(self, per_rank: int = MOST_PER_RANK) -> Table:
        """The pipeline's schedule, in ticks, of so many micro-batches per rank at most: more change nothing but the number
        of rounds, and in GPipe, whose every micro-batch is in flight, are all there."""
        return table_of(*self._numbers(per_rank))

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        return self.pipeline.held.stages if self.pipeline else stages(self.model, 1)

    def stride(self, axis: str) -> int:
        """Devices between neighbours along a mesh axis."""
        axes = tuple(self.mesh.shape)
        inner = axes[axes.index(axis) + 1 :]
        return functools.reduce(lambda n, a: n * self.size(a), inner, 1)

    def link(self, axis: str) -> Link:
        """What neighbours along an axis have between them: NVLink where all of the axis lies in a node."""
        within = self.stride(axis) * self.size(axis) <= self.hardware.node
        return self.hardware.nvlink if within else self.hardware.nic


def run_of(cfg: Config, devices: int, hardware: Hardware) -> Run:
    return Run(cfg, abstract_mesh(cfg.mesh, devices), hardware)

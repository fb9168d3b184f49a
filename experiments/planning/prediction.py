"""What a run is predicted to need and to take: memory, seconds of a step and what follows from them."""

import dataclasses

from experiments.planning import times
from experiments.planning.footprint import footprint, state
from experiments.planning.run import Run

DAY, TRILLION = 86_400, 1e12


@dataclasses.dataclass(frozen=True)
class Prediction:
    """memory: bytes of each part on a device. ran: of all micro-batches. optimizer: seconds of gather, scatter, update."""

    run: Run
    memory: dict[str, float]
    ran: times.Ran
    optimizer: float

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.run.hardware.usable

    @property
    def parts(self) -> dict[str, float]:
        """Seconds that add up to the step's."""
        bubble = {"bubble of the schedule": self.ran.bubble, "waiting at ticks": self.ran.waiting}
        return {**self.ran.parts, **(bubble if self.run.pipe > 1 else {}), "optimizer": self.optimizer}

    @property
    def step(self) -> float:
        return self.ran.seconds + self.optimizer

    @property
    def flops_per_token(self) -> float:
        return self.run.model.flops_per_token(self.run.cfg.data.seq_len)

    @property
    def mfu(self) -> float:
        """Of the BF16 peak, as published figures are; causal, without MTP."""
        done = self.flops_per_token * self.run.tokens_per_step
        return done / (self.step * self.run.devices * self.run.hardware.bf16)

    @property
    def tokens_per_day(self) -> float:
        return self.run.tokens_per_step / self.step * DAY

    @property
    def gpu_hours(self) -> float:
        """Per trillion tokens."""
        return gpu_hours(self.step, self.run.tokens_per_step, self.run.devices)


def gpu_hours(step: float, tokens_per_step: int, devices: int) -> float:
    """GPU-hours per trillion tokens."""
    return TRILLION / tokens_per_step * step * devices / 3600


def optimizer(run: Run) -> float:
    return times.optimizer(run, state(run).master / 4)


def predict(run: Run) -> Prediction:
    """Raises ValueError for what does not divide over the mesh."""
    return Prediction(run, footprint(run), times.micro_batches(run), optimizer(run))

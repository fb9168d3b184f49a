"""What a deployment unit is predicted to hold and to take: memory, requests, seconds of its steps and tokens per second."""

import dataclasses
import functools

from deepseek_jax.serving.deployment import Deployment
from experiments.planning.hardware import Hardware
from experiments.planning.serving_memory import Memory, memory
from experiments.planning.serving_times import Parts, decode_step, prefill_step
from experiments.planning.units import Unit, unit_of


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of one phase. rows: sequences of a device in decoding, prompts in prefill. tokens: that count, of a device: drawn
    ones (accepted drafts included), or read ones. deepep, house: with DeepEP's exchange, and with this project's."""

    phase: str
    rows: float
    tokens: float
    deepep: Parts
    house: Parts

    def per_second(self, seconds: float) -> float:
        """Tokens of a device."""
        return self.tokens / seconds


@dataclasses.dataclass(frozen=True)
class Prediction:
    unit: Deployment
    hardware: Hardware
    context: int
    cached: int
    memory: Memory
    steps: tuple[Step, ...]

    @property
    def requests(self) -> int:
        """Sequences of `context` tokens that run at the same time on a device."""
        return min(self.unit.rows, self.memory.requests(self.context))


def predict(unit: Deployment, hardware: Hardware, context: int, cached: int, acceptance: float) -> Prediction:
    """acceptance: of drafts."""
    found = Prediction(unit, hardware, context, cached, memory(unit, hardware), ())
    steps = []
    if unit.role != "prefill" and found.requests:
        steps.append(_decode(found, acceptance))
    if unit.role != "decode":
        steps.append(_prefill(found))
    return dataclasses.replace(found, steps=tuple(steps))


def _both(unit: Deployment) -> tuple[Unit, Unit]:
    deepep = unit_of(unit)
    return deepep, dataclasses.replace(deepep, house=True)


def _decode(p: Prediction, acceptance: float) -> Step:
    step = functools.partial(
        decode_step, p.unit.model, hardware=p.hardware, rows=p.requests, context=p.context
    )
    deepep, house = (step(unit=unit) for unit in _both(p.unit))
    tokens = p.requests * (1 + acceptance if p.unit.drafts else 1)
    return Step("decode", p.requests, tokens, deepep, house)


def _prefill(p: Prediction) -> Step:
    """A chunk as large as a device takes, of whole prompts behind what is cached of them."""
    tokens = float(p.unit.chunk)
    prompts = tokens / min(tokens, p.context - p.cached)
    step = functools.partial(
        prefill_step,
        p.unit.model,
        hardware=p.hardware,
        tokens=tokens,
        prefix=p.cached,
        sequences=prompts,
    )
    deepep, house = (step(unit=unit) for unit in _both(p.unit))
    return Step("prefill", prompts, tokens, deepep, house)

"""A unit that always has as much to do as it can hold: what benchmarks of one phase measure."""

import dataclasses

import numpy as np

from deepseek_jax.serving.pages import page_keys
from experiments.planning.cluster.clock import Work
from experiments.planning.cluster.decode import Decode
from experiments.planning.cluster.demand import Asked, Segment, Users
from experiments.planning.cluster.disk import Disk
from experiments.planning.cluster.jobs import Job
from experiments.planning.cluster.prefill import Prefill
from experiments.planning.cluster.setting import Setting, fitted
from experiments.planning.hardware import H100, Hardware
from experiments.planning.units import Unit


class _Prompts:
    """Jobs of prompts of one length, no two alike."""

    def __init__(self, prompt: int, answer: int, seed: int):
        self.prompt, self.answer, self.rng, self.count = prompt, answer, np.random.default_rng(seed), 0

    def job(self, answer: int = 0) -> Job:
        self.count += 1
        tokens = [129_280 + self.count, *self.rng.integers(0, 129_280, self.prompt - 1).tolist()]
        asked = Asked((), Segment(0, 0, answer or self.answer))
        return Job(str(self.count), asked, 0.0, tokens, page_keys(tokens), [0] * (answer or self.answer))


def prefill_rate(setting: Setting, prompt: int, ranks: int = 2, steps: int = 6) -> float:
    """Tokens per second and node of a prefill unit before which prompts wait."""
    unit, prompts = Prefill(setting, "prefill-0", ranks, Disk(1)), _Prompts(prompt, 1, 0)
    tokens = seconds = 0.0
    for _ in range(steps):
        while unit.load().queued < 2 * setting.budget * ranks:
            unit.add(prompts.job())
        took = unit.step(0.0)
        assert took is not None
        list(unit.finish())
        tokens, seconds = tokens + took.work.amount, seconds + took.seconds
    return 8 * tokens / seconds


def decode_rate(setting: Setting, rows: int, prompt: int, answer: int, ranks: int = 2) -> float:
    """Tokens per second and node of a decode unit whose every device always has so many sequences; they began at different
    times."""
    unit = Decode(setting, "decode-0", ranks, np.random.default_rng(0))
    prompts = _Prompts(prompt, answer, 0)
    for i in range(rows * ranks):
        unit.add(prompts.job(1 + i * answer // (rows * ranks)))
    steps = seconds = tokens = 0.0
    while steps < 2 * answer:
        turn = unit.turn(1)
        for _ in turn.ended:
            unit.add(prompts.job())
        if (steps := steps + 1) > answer:
            seconds, tokens = seconds + turn.took.seconds, tokens + turn.tokens
    return 8 * tokens / ranks / seconds


def uneven(setting: Setting, warm: int = 3, steps: int = 15) -> float:
    """Seconds of a step of a prefill unit before which the day's prompts wait, over those where all devices are alike and attend
    to as much as the day's tokens do in the mean; every device is simulated."""
    ranks = setting.prefill.devices
    users = Users(setting.day, np.random.default_rng(0))
    disk = Disk(400_000)
    unit, seconds, even = Prefill(setting, "prefill-0", ranks, disk), 0.0, 0.0
    for i in range(warm + steps):
        while unit.load().queued < 2 * setting.budget * ranks:
            asked = users.ask(0.0)
            for text in users.made_up:
                disk.put(page_keys(users.tokens(text)))
            users.made_up.clear()
            prompt = users.tokens(asked.text)
            unit.add(Job(str(asked.answer.number), asked, 0.0, prompt, page_keys(prompt), []))
        took = unit.step(0.0)
        assert took is not None
        list(unit.finish())
        if i >= warm:
            seconds += took.seconds
            even += setting.prefill_clock.even(Work(took.work.amount, setting.day.attended))
    return seconds / even


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A published figure of tokens per second and node: what was measured, and by what it is predicted."""

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


SGLANG_PREFILL = {1000: 57_674, 2000: 52.3e3, 4000: 50_302}  # tokens of a prompt -> tokens/s per node
SGLANG_DECODE = Unit(nodes=9, experts=4)
ANSWER = 100  # tokens, in SGLang's benchmark; the length changes little
ROWS = 256


def sglang(setting: Setting, hardware: Hardware = H100) -> list[Anchor]:
    """SGLang on 96 H100s (LMSYS, 5 May 2025): prefill of 4 nodes, decode of 9 with 256 sequences on each device, prompts of
    2,000 tokens, none in a cache; and its prefill alone with shorter and longer ones. With the constants of DeepSeek's day."""
    like = dataclasses.replace(setting, hardware=hardware, decode=SGLANG_DECODE)
    return [
        *(
            Anchor(f"SGLang, prefill, prompts of {prompt:,}", measured, prefill_rate(like, prompt))
            for prompt, measured in SGLANG_PREFILL.items()
        ),
        Anchor("SGLang, decode, 256 sequences", 22.3e3, decode_rate(like, ROWS, 2000, ANSWER)),
    ]


def deepseek(setting: Setting, prefill: float = 73.7e3, decode: float = 14.8e3) -> Setting:
    """The setting with constants that give DeepSeek's tokens per second and node."""
    return fitted(dataclasses.replace(setting, uneven=uneven(setting)), prefill, decode)

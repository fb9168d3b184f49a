"""How long steps of a unit take: the roofline of `serving_times.py`, with what waiting for the slowest device adds.

In each layer all devices of a unit wait for one another, where tokens go to experts and come back. So a step takes what it would
if all devices were alike, and what the slowest has more of its own work: attention, dense layers, gate, shared expert. The
whole is multiplied by the phase's constant, `slow`.
"""

import bisect
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from deepseek_jax.config import ModelConfig
from experiments.planning.hardware import Hardware
from experiments.planning.serving_times import Parts, decode_step, prefill_step
from experiments.planning.units import Unit

SHARED = (
    "routed experts",
    "dispatch",
    "combine",
)  # all devices have as much of these, or wait for them together
ROWS = (1, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512)
TOKENS = (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
CONTEXTS = (0, 1024, 2048, 3072, 4096, 5120, 6144, 8192, 16384, 131072)


Step = Callable[[float, float], Parts]


class Work(NamedTuple):
    """Of a device in a step. amount: rows, or tokens of chunks; context: tokens that each attends to, in the mean."""

    amount: float
    context: float


class Took(NamedTuple):
    """Seconds of a step. waiting: of these, for the slowest device. parts: name -> the others, in proportion."""

    seconds: float
    waiting: float
    work: Work


class Tables(NamedTuple):
    """Seconds [amount][context] of a step where all devices are alike, and of a device's own work in it."""

    counts: Sequence[int]
    whole: list[list[float]]
    own: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Clock:
    """Of one unit in one phase. step: (amount, context) -> Parts. slow: the constant of the phase."""

    step: Step
    tables: Tables
    devices: int
    slow: float = 1.0

    @functools.cached_property
    def line(self) -> tuple[float, float]:
        """Seconds of a device's own work for a token, and for each that it attends to."""
        none, some = (row[CONTEXTS.index(4096)] - row[0] for row in (self.tables.own[0], self.tables.own[-1]))
        per_token = (self.tables.own[-1][0] - self.tables.own[0][0]) / (
            self.tables.counts[-1] - self.tables.counts[0]
        )
        return per_token, (some - none) / (self.tables.counts[-1] - self.tables.counts[0]) / 4096

    def even(self, work: Work) -> float:
        """Seconds where all devices have the same."""
        return self.slow * _between(self.tables.whole, self.tables.counts, work) if work.amount else 0.0

    def took(self, works: Sequence[Work]) -> Took:
        """Where some devices of the unit have these, and the others are like them."""
        amount = sum(w.amount for w in works) / len(works)
        mean = Work(amount, sum(w.amount * w.context for w in works) / len(works) / amount)
        waiting = self.slow * self._slowest(works)
        return Took(self.even(mean) + waiting, waiting, mean)

    def _slowest(self, works: Sequence[Work]) -> float:
        """Seconds of its own work that the slowest device of all has more than the mean; of those that are not simulated, by
        the spread among those that are, if times are normal."""
        owns = [_between(self.tables.own, self.tables.counts, w) if w.amount else 0.0 for w in works]
        mean = sum(owns) / len(owns)
        if len(owns) == self.devices or len(owns) == 1:
            return max(owns) - mean
        return expected_most(self.devices) * statistics.stdev(owns)


def own(parts: Parts) -> float:
    """Seconds of what a device does for its own tokens."""
    return sum(part.seconds for name, part in parts.parts.items() if name not in SHARED)


@functools.cache
def expected_most(n: int) -> float:
    """The largest of n normal numbers, in standard deviations (Blom's approximation)."""
    return statistics.NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0


def _between(table: list[list[float]], counts: Sequence[int], work: Work) -> float:
    """Bilinear; beyond the ends of the table, its last slope."""
    i, a = _place(counts, work.amount)
    j, b = _place(CONTEXTS, work.context)
    low = table[i][j] * (1 - b) + table[i][j + 1] * b
    high = table[i + 1][j] * (1 - b) + table[i + 1][j + 1] * b
    return low * (1 - a) + high * a


def _place(grid: Sequence[int], x: float) -> tuple[int, float]:
    i = min(max(bisect.bisect_right(grid, x) - 1, 0), len(grid) - 2)
    return i, (x - grid[i]) / (grid[i + 1] - grid[i])


def _tables(step: Step, counts: Sequence[int]) -> Tables:
    steps = [[step(n, x) for x in CONTEXTS] for n in counts]
    return Tables(
        counts, [[p.seconds for p in row] for row in steps], [[own(p) for p in row] for row in steps]
    )


@functools.lru_cache(64)
def _decode(model: ModelConfig, unit: Unit, hardware: Hardware) -> tuple[Step, Tables]:
    def step(rows: float, context: float) -> Parts:
        return decode_step(model, unit, hardware, rows, context)

    return step, _tables(step, ROWS)


@functools.lru_cache(64)
def _prefill(model: ModelConfig, unit: Unit, hardware: Hardware, text: float) -> tuple[Step, Tables]:
    def step(tokens: float, context: float) -> Parts:
        sequences = max(1.0, tokens / text)
        prefix = max(0.0, context - tokens / sequences / 2)
        return prefill_step(model, unit, hardware, tokens, prefix, sequences)

    return step, _tables(step, TOKENS)


def decode_clock(model: ModelConfig, unit: Unit, hardware: Hardware, slow: float = 1.0) -> Clock:
    return Clock(*_decode(model, unit, hardware), unit.devices, slow)


def prefill_clock(
    model: ModelConfig, unit: Unit, hardware: Hardware, text: float, slow: float = 1.0
) -> Clock:
    """text: tokens of a sequence that are computed, in the mean."""
    return Clock(*_prefill(model, unit, hardware, text), unit.devices, slow)

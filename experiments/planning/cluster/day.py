"""A day in a time lapse: each hour is a window of some seconds, in which the cluster runs as it does in that hour.

The state goes on from window to window, so that nothing begins anew. The units of an hour follow its load (`Setting.units`); of
their devices as many are simulated as `Shape` says, with their share of the requests.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.planning.cluster.cluster import Cluster, Sample, Shape
from experiments.planning.cluster.jobs import Job
from experiments.planning.cluster.setting import HOURS, Setting

WARM = 60.0  # seconds before the day, at the load of its first hour
QUANTILES = (0.5, 0.9, 0.99)


class Window(NamedTuple):
    """An hour. nodes: prefill, decode. jobs: that ended in it; samples: steps that began in it; seconds: how long it is."""

    hour: int
    nodes: tuple[int, int]
    jobs: Sequence[Job]
    samples: Sequence[Sample]
    seconds: float

    def of(self, phase: str) -> list[Sample]:
        return [s for s in self.samples if s.name.startswith(phase)]


@dataclasses.dataclass(frozen=True)
class Lapse:
    """A simulated day. preempted: sequences that lost their pages; waiting: requests that had not ended when it was over."""

    setting: Setting
    shape: Shape
    windows: Sequence[Window]
    preempted: int
    waiting: int

    # --- throughput -----------------------------------------------------------------------------------------------

    def nodes(self) -> tuple[float, float]:
        """Mean of the day."""
        prefill, decode = np.mean([w.nodes for w in self.windows], axis=0)
        return float(prefill), float(decode)

    def peak(self) -> int:
        return max(sum(w.nodes) for w in self.windows)

    def uncached(self, w: Window) -> float:
        """Tokens per second and node that prefill computed."""
        devices = self.shape.prefill * self.shape.prefill_ranks
        return 8 * sum(s.tokens for s in w.of("prefill")) / w.seconds / devices

    def drawn(self, w: Window) -> float:
        """Tokens per second and node that decode drew."""
        return (
            8
            * sum(s.tokens for s in w.of("decode"))
            / w.seconds
            / self.shape.decode
            / self.shape.decode_ranks
        )

    def hits(self) -> float:
        """Share of the prompts' tokens that the cache had."""
        jobs = self.jobs
        return sum(j.cached for j in jobs) / sum(len(j.prompt) for j in jobs)

    def input_rate(self) -> float:
        """Tokens per second and node, those that the cache had included, over the day."""
        computed = sum(self.uncached(w) * w.nodes[0] for w in self.windows)
        return computed / (1 - self.hits()) / sum(w.nodes[0] for w in self.windows)

    def output_rate(self) -> float:
        drawn = sum(self.drawn(w) * w.nodes[1] for w in self.windows)
        return drawn / sum(w.nodes[1] for w in self.windows)

    # --- users ----------------------------------------------------------------------------------------------------

    @property
    def jobs(self) -> list[Job]:
        return [job for w in self.windows for job in w.jobs]

    def speed(self) -> float:
        """Tokens per second of a user: tokens after the first over the time that they took."""
        jobs = self.jobs
        return sum(len(j.answer) - 1 for j in jobs) / sum(j.end - j.first for j in jobs)

    def context(self) -> float:
        """Mean tokens in the cache of a sequence, over the tokens that are drawn."""
        samples = [s for w in self.windows for s in w.of("decode")]
        rows = sum(sum(s.counts) * s.steps for s in samples)
        return sum(float(np.dot(s.counts, s.contexts)) * s.steps for s in samples) / rows

    def wait_of(self, q: float) -> float:
        return float(np.quantile([j.wait for j in self.jobs], q))

    # --- money ----------------------------------------------------------------------------------------------------

    def per_million(self, price: float) -> tuple[float, float, float]:
        """Dollars per million tokens that come in and that go out, each of its own nodes; and what the day costs."""
        prefill, decode = (8 * 24 * price * n for n in self.nodes())
        seconds = 86_400.0
        came = self.input_rate() * self.nodes()[0] * seconds / 1e6
        went = self.output_rate() * self.nodes()[1] * seconds / 1e6
        return prefill / came, decode / went, prefill + decode


def spread(values: Sequence[float]) -> list[float]:
    """`QUANTILES`; 0 of nothing."""
    return np.quantile(values, QUANTILES).tolist() if len(values) else [0.0] * len(QUANTILES)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Requests per second for the simulated devices, hour by hour, and the share whose answers are followed."""

    setting: Setting
    shape: Shape

    def of_rank(self, hour: int) -> tuple[float, float]:
        """Requests per second for a prefill and a decode device."""
        s = self.setting
        asked = s.day.requests * s.day.load(hour + 0.5)
        prefill, decode = s.units(hour)
        return asked / (prefill * s.prefill.devices), asked / (decode * s.decode.devices)

    def prefill(self, hour: int) -> float:
        return self.shape.prefill * self.shape.prefill_ranks * self.of_rank(hour)[0]

    def decode(self, hour: int) -> float:
        return self.shape.decode * self.shape.decode_ranks * self.of_rank(hour)[1]

    def rows(self, hour: int) -> float:
        """Sequences of a decode device."""
        return self.setting.rows_for(self.of_rank(hour)[1] * self.setting.day.answer)

    def all(self, hour: int) -> float:
        """Prompts as many as prefill is to get, or decode if that is more: then some prompts more are computed."""
        return max(self.prefill(hour), self.decode(hour))

    def share(self, hour: int) -> float:
        return min(1.0, self.decode(hour) / self.all(hour))


def simulate(
    setting: Setting,
    shape: Shape,
    seconds: float,
    seed: int,
    hours: Sequence[int] = range(HOURS),
    doing: Callable[[int], None] = lambda hour: None,
    warm: float = WARM,
) -> Lapse:
    """seconds: of each hour. doing: is told the hour that begins."""
    cluster, rates = Cluster(setting, shape, seed), Rates(setting, shape)
    cluster.rate, cluster.share = rates.all(hours[0]), rates.share(hours[0])
    cluster.start(rates.all(hours[0]), rates.rows(hours[0]))
    cluster.run(warm)
    windows = list(_windows(cluster, rates, seconds, hours, doing))
    return Lapse(setting, shape, windows, cluster.preempted, len(cluster.open))


def _windows(
    cluster: Cluster, rates: Rates, seconds: float, hours: Sequence[int], doing: Callable[[int], None]
) -> Iterator[Window]:
    end = cluster.now
    for hour in hours:
        doing(hour)
        cluster.rate, cluster.share = rates.all(hour), rates.share(hour)
        cluster.jobs.clear()
        cluster.samples.clear()
        end += seconds
        cluster.run(end)
        yield Window(hour, rates.setting.nodes(hour), tuple(cluster.jobs), tuple(cluster.samples), seconds)

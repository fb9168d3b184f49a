"""Counters, gauges and histograms in the Prometheus text format.

requests = Counter("vllm:request_success_total", "Requests that ended.", ("finished_reason",))
requests.add(1, "stop")
text(("model_name", "tiny"), [requests])
"""

import abc
import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

Labels = Sequence[tuple[str, str]]

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)  # fmt: skip


class Metric(abc.ABC):
    """A name with its help; `samples` gives (suffix of the name, labels, value)."""

    kind = ""

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()):
        self.name, self.help, self.labels = name, help, tuple(labels)

    @abc.abstractmethod
    def samples(self) -> Iterable[tuple[str, Labels, float]]: ...

    def lines(self, common: Labels) -> Iterable[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} {self.kind}"
        for suffix, labels, value in self.samples():
            shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in (*common, *labels))
            yield f"{self.name}{suffix}{{{shown}}} {_number(value)}"


class Counter(Metric):
    """Counts up; one count for each combination of its labels' values."""

    kind = "counter"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()):
        super().__init__(name, help, labels)
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, amount: float = 1, *values: str) -> None:
        self._values[values] = self._values.get(values, 0) + amount

    def value(self, *values: str) -> float:
        return self._values.get(values, 0)

    def samples(self) -> Iterable[tuple[str, Labels, float]]:
        for values, count in sorted(self._values.items()):
            yield "", tuple(zip(self.labels, values, strict=True)), count


class Read(Metric):
    """Reads its value where it is kept, when it is asked for. kind: "gauge" or "counter"."""

    def __init__(self, name: str, help: str, read: Callable[[], float], kind: str = "gauge"):
        super().__init__(name, help)
        self.kind, self._read = kind, read

    def samples(self) -> Iterable[tuple[str, Labels, float]]:
        yield "", (), self._read()


class ReadEach(Metric):
    """Reads its values where they are kept, one for each value of a label."""

    def __init__(self, name: str, help: str, label: str, read: Callable[[], Mapping[str, float]], kind: str):
        super().__init__(name, help, (label,))
        self.kind, self._read = kind, read

    def samples(self) -> Iterable[tuple[str, Labels, float]]:
        for value, number in sorted(self._read().items()):
            yield "", ((self.labels[0], value),), number


class Info(Metric):
    """Facts, as labels of a gauge that is 1."""

    kind = "gauge"

    def __init__(self, name: str, help: str, facts: Callable[[], Labels]):
        super().__init__(name, help)
        self._facts = facts

    def samples(self) -> Iterable[tuple[str, Labels, float]]:
        yield "", self._facts(), 1


class Histogram(Metric):
    """How many observations were at most each bound; their sum and number."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float] = SECONDS):
        super().__init__(name, help)
        self._bounds, self._counts, self._sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def samples(self) -> Iterable[tuple[str, Labels, float]]:
        sums = itertools.accumulate(self._counts)
        for bound, count in zip((*map(_number, self._bounds), "+Inf"), sums, strict=True):
            yield "_bucket", (("le", bound),), count
        yield "_sum", (), self._sum
        yield "_count", (), sum(self._counts)


def text(common: Labels, metrics: Iterable[Metric]) -> str:
    """All metrics, each sample with the common labels."""
    return "\n".join(line for metric in metrics for line in metric.lines(common)) + "\n"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

"""Units, router and users over time: what happens next happens first.

A request goes to the pair that the router chooses; a prefill device computes its prompt; its latents travel; a decode device
draws its answer; the conversation may go on. Only some devices of each unit are simulated, and they get their share of what
is asked: rates are of these.
"""

import heapq
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.serving.pages import page_keys
from deepseek_jax.serving.router.choice import Ask, Choice, Sent
from experiments.planning.cluster.clock import Took
from experiments.planning.cluster.decode import Decode
from experiments.planning.cluster.demand import PAGE, Asked, Text, Users
from experiments.planning.cluster.disk import Disk
from experiments.planning.cluster.jobs import Job
from experiments.planning.cluster.prefill import Prefill
from experiments.planning.cluster.setting import Setting

HEARTBEAT = 1.0  # seconds after which servers tell the router their load


class Shape(NamedTuple):
    """What is simulated: units, and devices of each. stride: decode steps between two looks at what has come."""

    prefill: int = 2
    prefill_ranks: int = 8
    decode: int = 2
    decode_ranks: int = 6
    stride: int = 4


class Sample(NamedTuple):
    """Steps of a unit. tokens: computed or drawn, on the devices that are simulated. counts, contexts: of each device, rows or
    tokens, and what each attends to."""

    time: float
    name: str
    took: Took
    steps: int
    tokens: int
    counts: tuple[float, ...]
    contexts: tuple[float, ...]


class Cluster:
    """Attributes:
    rate: requests per second for all prefill devices that are simulated; share: chance that a request's answer is followed.
        Both may be changed.
    jobs: that ended. samples: of all steps. sent, lost, preempted: counts.
    """

    def __init__(self, setting: Setting, shape: Shape, seed: int = 0):
        self.setting, self.shape, self.now = setting, shape, 0.0
        self.rng = np.random.default_rng(seed)
        self.users = Users(setting.day, self.rng)
        self.rate, self.share = 0.0, 1.0
        self.choice = Choice()
        self.jobs: list[Job] = []
        self.samples: list[Sample] = []
        self.sent = self.lost = self.preempted = 0
        self.open: dict[str, Job] = {}
        self.disk = Disk(1)
        self.units: dict[str, Prefill | Decode] = {}
        self._busy: set[str] = set()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()

    def start(self, rate: float, rows: float = 0.0) -> None:
        """Units, and a cache on disk of so many minutes at `rate` requests per second. rows: sequences of each decode device
        that are amid their answers."""
        day = self.setting.day
        self.disk = Disk(int(60 * self.setting.kept * rate * (day.text + day.answer) / PAGE))
        for role, count in (("prefill", self.shape.prefill), ("decode", self.shape.decode)):
            for i in range(count):
                self.bring(f"{role}-{i:02}")
        for i in range(round(rows * self.shape.decode_ranks) * self.shape.decode):
            self._amid(f"decode-{i % self.shape.decode:02}")
        self._at(0.0, self._beat)
        self._at(0.0, self._arrive, False)

    def _amid(self, name: str) -> None:
        job = self._job(self.users.amid())
        job.sent, job.arrival = Sent(None, name, 0, 0, 0, 0), -1.0
        self._join(job)

    def bring(self, name: str) -> None:
        """A unit is there, empty."""
        make: Any = self.shape.prefill_ranks, self.shape.decode_ranks
        if name.startswith("prefill"):
            self.units[name] = Prefill(self.setting, name, make[0], self.disk)
        else:
            self.units[name] = Decode(self.setting, name, make[1], self.rng)
        self._tell(name)

    def lose(self, name: str) -> None:
        """A unit is gone, with all that it computes; the router sends it to others, from the beginning."""
        unit = self.units.pop(name)
        self._busy.discard(name)
        self.choice.lost(name)
        self.lost += len(unit.jobs)
        for job in unit.jobs.values():
            job.first = -1.0
            self._send(job)

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, event, args = heapq.heappop(self._events)
            event(*args)
        self.now = until

    def at(self, time: float, event: Callable[..., None], *args: Any) -> None:
        self._at(time, event, *args)

    def _at(self, time: float, event: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (time, next(self._count), event, args))

    # --- requests -------------------------------------------------------------------------------------------------

    def _arrive(self, asks: bool = True) -> None:
        """One request, and the time of the next: Poisson."""
        if asks:
            self._send(self._job(self.users.ask(self.now)))
        wait = self.rng.exponential(1 / self.rate) if self.rate else 1.0
        self._at(self.now + wait, self._arrive, bool(self.rate))

    def _job(self, asked: Asked) -> Job:
        self._keep_made_up()
        prompt, answer = self.users.tokens(asked.text), self.users.tokens([asked.answer])
        keys, followed = page_keys(prompt), bool(self.rng.random() < self.share)
        self.sent += 1
        job = Job(str(self.sent), asked, self.now, prompt, keys, answer, followed)
        self.open[job.id] = job
        return job

    def _keep_made_up(self) -> None:
        for text in self.users.made_up:
            self._keep(text)
        self.users.made_up.clear()

    def _keep(self, text: Text) -> None:
        self.disk.put(page_keys(self.users.tokens(text)))

    def _send(self, job: Job) -> None:
        job.tries += 1
        job.sent = self.choice.send(Ask(job.keys, len(job.prompt)))
        if job.sent is None or job.sent.prefill is None:  # nobody is there
            if job.sent is not None:
                self.choice.ended(job.sent)
            self._at(self.now + HEARTBEAT, self._send, job)
            return
        unit = self.units[job.sent.prefill]
        assert isinstance(unit, Prefill)
        unit.add(job)
        self._wake(unit)

    def _wake(self, unit: Prefill | Decode) -> None:
        if unit.name not in self._busy:
            self._busy.add(unit.name)
            self._at(self.now, self._prefill if isinstance(unit, Prefill) else self._decode, unit)

    def _there(self, unit: Prefill | Decode) -> bool:
        return self.units.get(unit.name) is unit

    # --- steps ----------------------------------------------------------------------------------------------------

    def _prefill(self, unit: Prefill) -> None:
        if not self._there(unit):
            return
        took = unit.step(self.now)
        if took is None:
            self._busy.discard(unit.name)
            return
        self._sampled(unit, took, 1, unit.works)
        self._at(self.now + took.seconds, self._prefilled, unit)

    def _prefilled(self, unit: Prefill) -> None:
        if not self._there(unit):
            return
        for job, last in unit.finish():
            job.prefilled = self.now
            assert job.sent is not None
            job.sent = self.choice.prefilled(job.sent)
            if job.followed:
                self._at(self.now + self.setting.transfer(last), self._join, job)
            else:
                self.choice.ended(job.sent)
                self._at(self.now + len(job.answer) / self.setting.speed, self._end, job)
        self._prefill(unit)

    def _join(self, job: Job) -> None:
        assert job.sent is not None
        unit = self.units.get(job.sent.decode)
        if not isinstance(unit, Decode):
            self._send(job)  # it was lost meanwhile
            return
        job.joined = self.now
        unit.add(job)
        self._wake(unit)

    def _decode(self, unit: Decode) -> None:
        if not self._there(unit):
            return
        if unit.idle:
            self._busy.discard(unit.name)
            return
        turn = unit.turn(self.shape.stride)
        self.preempted += turn.preempted
        self._sampled(unit, turn.took, turn.steps, turn.works, turn.tokens)
        for job, steps in turn.first:
            job.first = self.now + steps * turn.took.seconds
        for job, steps in turn.ended:
            job.end = self.now + steps * turn.took.seconds
            self._at(job.end, self._ended, job)
        self._at(self.now + turn.steps * turn.took.seconds, self._decode, unit)

    def _ended(self, job: Job) -> None:
        assert job.sent is not None
        self.choice.ended(job.sent)
        if job.arrival >= 0:
            self.jobs.append(job)
        self._end(job)

    def _end(self, job: Job) -> None:
        """The answer is known: the conversation may go on, and the disk has it."""
        del self.open[job.id]
        self.users.ended(job.asked, self.now)
        self._keep((*job.asked.text, job.asked.answer))

    # --- what is told ---------------------------------------------------------------------------------------------

    def _sampled(self, unit: Any, took: Took, steps: int, works: Any, tokens: int | None = None) -> None:
        counts = tuple(w.amount for w in works)
        made = round(sum(counts)) if tokens is None else tokens
        self.samples.append(
            Sample(self.now, unit.name, took, steps, made, counts, tuple(w.context for w in works))
        )

    def _beat(self) -> None:
        for name in self.units:
            self._tell(name)
        self._at(self.now + HEARTBEAT, self._beat)

    def _tell(self, name: str) -> None:
        self.choice.heard(name, name.split("-")[0], self.units[name].load(), self.now)

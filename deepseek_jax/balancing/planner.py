"""`Planner` watches loads and makes new plans beside the engine, on a thread that lives as long as one plan takes.

    planner.offer(counts_le)         # after each step, or of several at once
    plan = planner.take()            # when no plan is being moved: None, or one to move to
    planner.report()                 # for metrics

Dims: l layer, e logical expert.
"""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepseek_jax.balancing.eplb import planned
from deepseek_jax.balancing.loads import Window
from deepseek_jax.balancing.moves import Moves, count, sources
from deepseek_jax.balancing.plan import Floats, Plan, Unit, balance, loads_of_gpus
from deepseek_jax.balancing.relabel import relabelled
from deepseek_jax.checks import ranges, require

# A layer moves if its fullest GPU gets this much less to do: less than that is within what a window of counts knows.
GAIN = 0.02


@dataclasses.dataclass(frozen=True)
class When:
    """When a plan is made.

    every: steps from one look at the loads to the next.
    below: a look makes a plan if the balance is lower; at 1 each does, so that plans come by the clock of steps.
    deadline_s: seconds after which a plan that does not come is an error.
    """

    every: int = 1000
    below: float = 1.0
    deadline_s: float = 60.0

    def __post_init__(self) -> None:
        ranges("", self, "every", 1, 1 << 31)
        ranges("", self, "below", 0.0, 1.0)
        ranges("", self, "deadline_s", 0.1, 86400.0)


class Look(NamedTuple):
    """What a look at the loads gave. before, after: balance on these loads of the plan that is and of `plan`, which is None where
    no other is wanted, or better. moves: what the move takes."""

    before: float
    after: float
    plan: Plan | None = None
    moves: Moves = Moves(0, 0, 0, 0)


class Report(NamedTuple):
    """age_steps, age_s: of the current plan, since it was taken. balance: of the current plan on the loads of the last look.
    before, after: balance as predicted when the current plan was made, without it and with it, and `moves`, what that took.
    taken: plans so far. waiting_s: for how long a finished plan has been waiting to be taken, 0 if none is. failures: plans that
    did not come; error: why the last did not."""

    age_steps: int
    age_s: float
    balance: float
    before: float
    after: float
    moves: Moves
    taken: int
    waiting_s: float
    failures: int
    error: str


class PlanningError(RuntimeError):
    """A plan did not come. The current one holds, and the next look tries again."""


def look(count_le: Floats, current: Plan, unit: Unit, below: float = 1.0) -> Look:
    """A plan for these loads whose layers are those of the current one but for those that gain by it."""
    load_lg = loads_of_gpus(current, count_le, unit.gpus)
    before = balance(load_lg)
    if before >= below:
        return Look(before, before)
    new = planned(count_le, unit)
    gains_l = loads_of_gpus(new, count_le, unit.gpus).max(1) < (1 - GAIN) * load_lg.max(1)
    if not gains_l.any():
        return Look(before, before)
    new = relabelled(new, current, unit.gpus, unit.nodes, together=unit.hierarchical)
    plan = Plan(np.where(gains_l[:, None], new.physical_lp, current.physical_lp))
    moves = count(sources(plan, current, unit.gpus, unit.nodes), unit.gpus, unit.nodes)
    return Look(before, balance(loads_of_gpus(plan, count_le, unit.gpus)), plan, moves)


class Planner:
    """Makes plans beside the thread that owns it and calls it; `report` alone may be called from others.

    A plan that is not taken waits, and no other is made meanwhile: nothing blocks. A worker that fails, or is not heard of within
    the deadline, raises PlanningError once, at the owner's next call, and is left alone.

    Raises ValueError: a plan that does not fit window and unit, GPUs that do not divide over nodes.

    Attributes:
        current: the plan that was taken last.
        window: the loads. Fill it from a file, or write it into one (`loads.py`).
    """

    def __init__(
        self,
        current: Plan,
        unit: Unit,
        when: When,
        window: Window,
        *,
        look: Callable[[Floats, Plan, Unit, float], Look] = look,
        clock: Callable[[], float] = time.monotonic,
    ):
        layers, experts = window.count_le.shape
        shape = current.physical_lp.shape
        require(len(shape) == 2 and shape[0] == layers, f"plan of shape {shape} for loads of {layers} layers")
        require(unit.gpus % unit.nodes == 0, f"{unit.gpus} GPUs do not divide over {unit.nodes} nodes")
        self.current = current.checked(experts, unit.slots)
        self.window = window
        self._unit, self._when, self._look, self._clock = unit, when, look, clock
        self._steps = 0  # since the last look
        self._job: _Job | None = None
        self._found: tuple[Look, float] | None = None  # a plan to be taken, and since when
        self._report = Report(0, clock(), 1.0, 1.0, 1.0, Moves(0, 0, 0, 0), 0, 0.0, 0, "")

    def offer(self, count_le: npt.ArrayLike, steps: int = 1) -> None:
        """Rows of each expert in some steps [l, e]. Raises ValueError for counts that are none, PlanningError."""
        self.window.add(count_le)
        self._steps += steps
        self._report = self._report._replace(age_steps=self._report.age_steps + steps)
        self._hear()
        idle = self._job is None and self._found is None
        if idle and self._steps >= self._when.every and self.window.count_le.any():
            self._steps = 0
            args = self.window.count_le.copy(), self.current, self._unit, self._when.below
            self._job = _Job(lambda: self._look(*args), self._clock())

    def take(self) -> Plan | None:
        """A plan that is finished, once, which is then the current one; its age begins here. Raises PlanningError."""
        self._hear()
        if self._found is None:
            return None
        (before, after, plan, moves), _ = self._found
        self._found = None
        assert plan is not None
        self.current = plan
        self._report = self._report._replace(
            age_steps=0, age_s=self._clock(), balance=after, before=before, after=after, moves=moves,
            taken=self._report.taken + 1,
        )  # fmt: skip
        return plan

    def report(self) -> Report:
        report, found, now = self._report, self._found, self._clock()
        return report._replace(age_s=now - report.age_s, waiting_s=now - found[1] if found else 0.0)

    def _hear(self) -> None:
        """Takes what the worker found, or raises what became of it."""
        job = self._job
        if job is None or not (job.done() or self._clock() - job.since > self._when.deadline_s):
            return
        self._job = None
        error = job.found.exception() if job.done() else TimeoutError(f"no plan in {self._when.deadline_s} s")
        if error is not None:
            said = f"{type(error).__name__}: {error}"
            self._report = self._report._replace(failures=self._report.failures + 1, error=said)
            raise PlanningError(f"experts could not be planned anew: {said}") from error
        found = job.found.result()
        self._report = self._report._replace(balance=found.before)
        if found.plan is not None:
            self._found = found, self._clock()


class _Job:
    """A function on a thread of its own, which ends with it, or with the process."""

    def __init__(self, function: Callable[[], Look], since: float):
        self.since = since
        self.found: concurrent.futures.Future[Look] = concurrent.futures.Future()
        self.done = self.found.done
        threading.Thread(target=self._run, args=(function,), name="experts' planner", daemon=True).start()

    def _run(self, function: Callable[[], Look]) -> None:
        try:
            self.found.set_result(function())
        except BaseException as error:
            self.found.set_exception(error)

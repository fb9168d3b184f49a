"""Time and memory that a schedule takes: `simulate`, where each rank goes on as soon as it can, and `synchronous`, where
all ranks meet whenever something is sent, as in a table of ticks.

Costs are a mapping, in any unit of time:

    "F", "B", "W"   of a forward, of a backward with weight gradients, of weight gradients alone
    "Bi"            of a backward without weight gradients; default: B - W
    "F&B"           of a forward and a backward at once; default: F + B
    "hop"           of a message between ranks; default: 0

Each is a number; F, B, W and Bi may be arrays or mappings over stages, F&B an array [stage of F, stage of B].
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.parallel.pipeline.ops import Done, Item, Op, Schedule

Costs = Mapping[str, Any]

_UNIT = {"F": 1, "B": 1, "W": 1, "Bi": 1, "F&B": 1}


class Event(NamedTuple):
    """A rank runs an op from `start` to `end`."""

    rank: int
    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a schedule takes.

    Attributes:
        makespan: until the last rank is done.
        busy: time in ops, per rank.
        peak: micro-batches between their forward and their backward, per rank, at the most (those of a pair, both).
        queue: weight gradients that wait, per rank, at the most.
        events: in an order in which they can happen.
    """

    makespan: float
    busy: tuple[float, ...]
    peak: tuple[int, ...]
    queue: tuple[int, ...]
    events: tuple[Event, ...]

    @property
    def bubble(self) -> tuple[float, ...]:
        """Time without an op, per rank."""
        return tuple(self.makespan - busy for busy in self.busy)


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Runs a schedule: a rank starts its next op once it is free and has received what the op needs.

    Raises:
        ValueError: a cost is missing, unknown, not finite or negative, or has another shape; an op comes twice, or
            waits for what never comes.
    """
    price = _Prices(costs, schedule.num_stages)
    done: dict[Done, float] = {}
    events: list[Event] = []
    position, clock = [0] * schedule.num_ranks, [0.0] * schedule.num_ranks
    waiting: dict[Done, list[int]] = defaultdict(list)
    runnable = deque(range(schedule.num_ranks))
    while runnable:
        rank = runnable.popleft()
        while position[rank] < len(schedule.ops[rank]):
            op = schedule.ops[rank][position[rank]]
            needs = schedule.needs(rank, op)
            if missing := [d for d in needs if d not in done]:
                waiting[missing[0]].append(rank)
                break
            there = [done[d] + price.hop * (d.rank != rank) for d in needs]
            start = max([clock[rank], *there])
            clock[rank] = start + price.of(schedule, rank, op)
            events.append(Event(rank, op, start, clock[rank]))
            position[rank] += 1
            for d in schedule.does(rank, op):
                if d in done:
                    raise ValueError(f"{schedule.name}: {d} comes twice")
                done[d] = clock[rank]
                runnable.extend(waiting.pop(d, ()))
    for d, ranks in waiting.items():
        op = schedule.ops[ranks[0]][position[ranks[0]]]
        raise ValueError(f"{schedule.name}: rank {ranks[0]} waits before {op} for {d}, which never comes")
    return _timeline(schedule, events)


def rows(schedule: Schedule) -> list[dict[int, Op]]:
    """Ticks, each as rank -> op. An op runs at the first tick after those of what it needs."""
    found: dict[int, dict[int, Op]] = defaultdict(dict)
    for event in simulate(schedule, _UNIT).events:
        found[int(event.start)][event.rank] = event.op
    return [found[tick] for tick in range(len(found))]


def synchronous(schedule: Schedule, costs: Costs) -> Timeline:
    """Runs a schedule tick by tick: after a tick that sends something to another rank, each waits for all others.

    Raises:
        ValueError: as `simulate`.
    """
    price = _Prices(costs, schedule.num_stages)
    clock = [0.0] * schedule.num_ranks
    events = []
    for row in rows(schedule):
        for rank, op in row.items():
            start, clock[rank] = clock[rank], clock[rank] + price.of(schedule, rank, op)
            events.append(Event(rank, op, start, clock[rank]))
        if any(_sends(schedule, rank, op) for rank, op in row.items()):
            clock = [max(clock) + price.hop] * schedule.num_ranks
    return _timeline(schedule, events)


def _sends(schedule: Schedule, rank: int, op: Op) -> bool:
    targets = [schedule.to(done) for done in schedule.does(rank, op)]
    return any(target is not None and target[0] != rank for target in targets)


def _timeline(schedule: Schedule, events: list[Event]) -> Timeline:
    busy = [0.0] * schedule.num_ranks
    for event in events:
        busy[event.rank] += event.end - event.start
    peaks = [_peaks(ops) for ops in schedule.ops]
    return Timeline(
        makespan=max((event.end for event in events), default=0.0),
        busy=tuple(busy),
        peak=tuple(live for live, _ in peaks),
        queue=tuple(queued for _, queued in peaks),
        events=tuple(events),
    )


def _peaks(ops: Iterable[Op]) -> tuple[int, int]:
    """(most micro-batches between forward and backward, most weight gradients that wait) of one rank."""
    live = queued = most_live = most_queued = 0
    for op in ops:
        live += op.forward is not None
        queued += op.split
        most_live, most_queued = max(most_live, live), max(most_queued, queued)
        live -= op.backward is not None
        queued -= op.weights is not None
    return most_live, most_queued


class _Prices:
    """Costs over stages, checked."""

    def __init__(self, costs: Costs, num_stages: int):
        known = ("F", "B", "W", "Bi", "F&B", "hop")
        if wrong := [key for key in costs if key not in known]:
            raise ValueError(f"costs of {wrong}: the known ones are {known}")
        if missing := [key for key in known[:3] if key not in costs]:
            raise ValueError(f"costs: {missing} missing, of F, B and W")
        n = num_stages
        self._f, self._b, self._w = (_cost(key, costs[key], (n,)) for key in known[:3])
        self._bi = _cost("Bi", costs.get("Bi", self._b - self._w), (n,))
        self._pair = _cost("F&B", costs.get("F&B", self._f[:, None] + self._b), (n, n))
        self.hop = float(_cost("hop", costs.get("hop", 0.0), ()))

    def of(self, schedule: Schedule, rank: int, op: Op) -> float:
        """The cost of an op. A pair whose weight gradients wait costs W less than one that makes them."""

        def stage(item: Item) -> int:
            return schedule.stage(rank, item.direction)

        cost = 0.0
        if op.forward is not None and op.backward is not None:
            cost += self._pair[stage(op.forward), stage(op.backward)]
            cost -= op.split * self._w[stage(op.backward)]
        elif op.forward is not None:
            cost += self._f[stage(op.forward)]
        elif op.backward is not None:
            cost += (self._bi if op.split else self._b)[stage(op.backward)]
        if op.weights is not None:
            cost += self._w[stage(op.weights)]
        return float(cost)


def _cost(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A cost as a float64 array of that shape. A number counts for all; a mapping is over stages."""
    if isinstance(value, Mapping):
        if sorted(value) != list(range(*shape[:1])):
            raise ValueError(f"costs of {name} over the stages {sorted(value)}, must be 0 to {shape[0] - 1}")
        value = [value[stage] for stage in range(shape[0])]
    array = np.asarray(value, np.float64)
    if array.shape not in ((), shape):
        raise ValueError(
            f"costs of {name} have the shape {array.shape}, must be a number or {shape}, over stages"
        )
    if not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"costs of {name} are {array.tolist()}, must be finite and not negative")
    return np.broadcast_to(array, shape)

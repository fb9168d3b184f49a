"""Pipeline schedules in the notation of their papers: one list of ops per rank, such as "F0.3", "Bi1.2", "F0.4&B1.0".

`pipeline/schedules.py` explains the notation and has the structured form that training runs.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from deepseek_jax.parallel.pipeline import schedules
from deepseek_jax.parallel.pipeline.ops import Item, Op, Schedule
from deepseek_jax.parallel.pipeline.simulate import Costs
from deepseek_jax.parallel.pipeline.simulate import simulate as simulate_schedule

Lists = list[list[str]]

_PART = re.compile(r"(F|Bi|B|W)([01])\.(\d+)")


class Simulated(NamedTuple):
    """What a schedule takes, in the unit of its costs.

    Attributes:
        makespan: until the last rank is done.
        bubble: time without an op, per rank.
        peak_activations: micro-batches between forward and backward at the most, per rank.
    """

    makespan: float
    bubble: tuple[float, ...]
    peak_activations: tuple[int, ...]


def gpipe(num_stages: int, num_microbatches: int) -> Lists:
    return as_lists(schedules.gpipe(num_stages, num_microbatches))


def one_f_one_b(num_stages: int, num_microbatches: int) -> Lists:
    return as_lists(schedules.one_f_one_b(num_stages, num_microbatches))


def zero_bubble(num_stages: int, num_microbatches: int) -> Lists:
    return as_lists(schedules.zero_bubble(num_stages, num_microbatches))


def dualpipe(num_stages: int, num_microbatches: int) -> Lists:
    return as_lists(schedules.dualpipe(num_stages, num_microbatches))


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Lists:
    """Of half as many ranks as stages."""
    return as_lists(schedules.dualpipe_v(num_ranks, num_microbatches))


def simulate(schedule: Schedule | Sequence[Sequence[str]], costs: Costs) -> Simulated:
    """Runs a schedule at the given costs of its ops (`pipeline/simulate.py`), such as {"F": 1, "B": 2, "W": 1, "F&B": 3}.

    Raises:
        ValueError: an op is not in the notation, comes twice or can never run; or the costs are wrong.
    """
    timeline = simulate_schedule(schedule if isinstance(schedule, Schedule) else from_lists(schedule), costs)
    return Simulated(timeline.makespan, timeline.bubble, timeline.peak)


def as_lists(schedule: Schedule) -> Lists:
    return [[str(op) for op in ops] for ops in schedule.ops]


def from_lists(lists: Sequence[Sequence[str]]) -> Schedule:
    """Reads a schedule. How its stages lie follows from the last rank: where there are two directions and it begins with
    direction 1, micro-batches start there (DualPipe); else they turn there (DualPipeV).

    Raises:
        ValueError: no rank, or an op that is not in the notation.
    """
    if not lists:
        raise ValueError("a schedule of no ranks")
    ops = tuple(tuple(map(_op, rank)) for rank in lists)
    forwards = [[op.forward for op in rank if op.forward] for rank in ops]
    directions = 1 + max((item.direction for items in forwards for item in items), default=0)
    turns = directions == 2 and forwards[-1][:1] != [Item(1, 0)]
    items = {item for rank in forwards for item in rank}
    num_micro = sum(item.direction == 0 or not turns for item in items)
    num_stages = 2 * len(ops) if turns else len(ops)
    return Schedule("schedule", len(ops), num_stages, num_micro, ops, directions)


def _op(text: str) -> Op:
    parts = [_PART.fullmatch(part) for part in text.split("&")]
    found = {m[1]: Item(int(m[2]), int(m[3])) for m in parts if m is not None}
    op = Op(found.get("F"), found.get("Bi", found.get("B")), found.get("W"), "Bi" in found)
    if not text or str(op) != text:
        raise ValueError(f"{text!r} is no op, such as 'F0.3', 'B1.2', 'Bi0.1', 'W0.1' or 'F0.3&B1.0'")
    return op

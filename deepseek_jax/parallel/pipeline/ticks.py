"""A schedule as a table of ticks, for ranks that run one program in step: `table`.

In each tick a rank first runs its op, then all ranks exchange messages. What a tick sends is there in the next one. What
has to be kept in between lies in four rings, each a pool of slots per rank:

    act     inputs of forwards, received and not yet used
    grad    gradients of a forward's result, received and not yet used
    saved   what a forward keeps for its backward, of all chunks of the rank
    queue   what a split backward keeps for its weight gradients

An op reads and writes in its tick, so what it writes (`saved`, `queue`) never lies where it reads, not in a pair either. A
message may come into the slot (`act`, `grad`) that the op of the same tick has read. Slots come from the exact lifetimes:
a ring has as many as its values at the busiest moment of the busiest rank.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from deepseek_jax.parallel.pipeline.ops import Done, Item, Op, Schedule
from deepseek_jax.parallel.pipeline.simulate import rows

PROGRAMS = ("idle", "F", "B", "Bi", "W", "F&B")

Place = tuple[int, Item]  # rank, micro-batch
Lives = dict[str, dict[Place, tuple[int, int]]]  # ring -> first and last tick in which a slot is taken


class Ticks(NamedTuple):
    """What every rank does in every tick: int32 [ticks, ranks] each, -1 where there is nothing. `lax.scan` takes it as xs.

    Attributes:
        program: index in `PROGRAMS`.
        forward_direction, forward_micro: the `Item` of the op's forward.
        forward_input: slot of `act` that it reads; -1: its input is the batch, on the first stage.
        forward_saved: slot of `saved` that it writes; -1: no backward follows, in a schedule of forwards only.
        backward_direction, backward_micro: the `Item` of the op's backward.
        backward_grad: slot of `grad` that it reads; -1: its gradient is the loss's, on the last stage.
        backward_saved: slot of `saved` that it reads.
        backward_queue: slot of `queue` that it writes; -1: it makes its weight gradients itself.
        weights_direction, weights_micro: the `Item` of the op's weight gradients.
        weights_queue: slot of `queue` that they read.
        act_from_left, act_from_right, act_from_self: slot of `act` into which the result comes of the forward that rank - 1,
            rank + 1, or the rank itself (DualPipeV's turn) has run in this tick.
        grad_from_left, grad_from_right, grad_from_self: slot of `grad` for the results of backwards, likewise.
    """

    program: np.ndarray
    forward_direction: np.ndarray
    forward_micro: np.ndarray
    forward_input: np.ndarray
    forward_saved: np.ndarray
    backward_direction: np.ndarray
    backward_micro: np.ndarray
    backward_grad: np.ndarray
    backward_saved: np.ndarray
    backward_queue: np.ndarray
    weights_direction: np.ndarray
    weights_micro: np.ndarray
    weights_queue: np.ndarray
    act_from_left: np.ndarray
    act_from_right: np.ndarray
    act_from_self: np.ndarray
    grad_from_left: np.ndarray
    grad_from_right: np.ndarray
    grad_from_self: np.ndarray


class Rings(NamedTuple):
    """Slots of each ring; 0: the schedule does without it."""

    act: int
    grad: int
    saved: int
    queue: int


class Table(NamedTuple):
    """A schedule that ranks run in step."""

    schedule: Schedule
    ticks: Ticks
    rings: Rings


def table(schedule: Schedule) -> Table:
    """Lays a schedule out in ticks. An op runs at the first tick after those of what it needs.

    Raises:
        ValueError: as `simulate`, for a schedule that does not run to its end.
    """
    ran = rows(schedule)
    slots = {ring: _slots(lives) for ring, lives in _lives(schedule, ran).items()}
    shape = len(ran), schedule.num_ranks
    columns = {name: np.full(shape, -1, np.int32) for name in Ticks._fields}
    columns["program"][:] = 0
    for tick, row in enumerate(ran):
        for rank, op in row.items():
            for name, value in _values(slots, rank, op).items():
                columns[name][tick, rank] = value
            for name, to, slot in _messages(schedule, slots, rank, op):
                columns[name][tick, to] = slot
    rings = Rings(*(max(slots[ring].values(), default=-1) + 1 for ring in Rings._fields))
    return Table(schedule, Ticks(**columns), rings)


def _lives(schedule: Schedule, ran: list[dict[int, Op]]) -> Lives:
    """When the slots of all rings are taken."""
    when = {
        done: tick for tick, row in enumerate(ran) for place in row.items() for done in schedule.does(*place)
    }
    lives: Lives = {ring: {} for ring in Rings._fields}
    for done, tick in when.items():
        here = done.rank, done.item
        if (message := _message(schedule, done)) is not None:
            lives[message[0]][message[1]] = (tick + 1, when[Done(done.kind, *message[1])])
        if done.kind == "B":
            lives["saved"][here] = (when[Done("F", *here)], tick)
        if done.kind == "W":
            lives["queue"][here] = (when[Done("B", *here)], tick)
    return lives


def _slots(lives: Mapping[Place, tuple[int, int]]) -> dict[Place, int]:
    """Gives every value the lowest slot of its rank that is free while it lives: no more slots than values at once."""
    found: dict[Place, int] = {}
    free: dict[int, list[int]] = defaultdict(list)
    taken: dict[int, list[tuple[int, int]]] = defaultdict(list)  # of a rank: (last tick, slot)
    for place, (first, last) in sorted(lives.items(), key=lambda x: x[1]):
        mine, others = free[place[0]], taken[place[0]]
        while others and others[0][0] < first:
            heapq.heappush(mine, heapq.heappop(others)[1])
        found[place] = heapq.heappop(mine) if mine else len(others)
        heapq.heappush(others, (last, found[place]))
    return found


def _values(slots: Mapping[str, Mapping[Place, int]], rank: int, op: Op) -> dict[str, int]:
    """The entries of an op but for its messages."""
    program = "F&B" if op.forward and op.backward else "F" if op.forward else "B" if op.backward else "W"
    found = {"program": PROGRAMS.index("Bi" if op.split else program)}

    def slot(ring: str, item: Item) -> int:
        return slots[ring].get((rank, item), -1)

    if op.forward is not None:
        f = op.forward
        found |= {"forward_direction": f.direction, "forward_micro": f.micro}
        found |= {"forward_input": slot("act", f), "forward_saved": slot("saved", f)}
    if op.backward is not None:
        b = op.backward
        found |= {"backward_direction": b.direction, "backward_micro": b.micro}
        found |= {"backward_grad": slot("grad", b), "backward_saved": slot("saved", b)}
        found |= {"backward_queue": slot("queue", b)}
    if op.weights is not None:
        w = op.weights
        found |= {"weights_direction": w.direction, "weights_micro": w.micro}
        found |= {"weights_queue": slot("queue", w)}
    return found


def _messages(
    schedule: Schedule, slots: Mapping[str, Mapping[Place, int]], rank: int, op: Op
) -> list[tuple[str, int, int]]:
    """(entry, receiving rank, slot) of what an op sends."""
    found = []
    for done in schedule.does(rank, op):
        if (message := _message(schedule, done)) is not None:
            ring, place = message
            side = ("self", "left", "right")[
                place[0] - rank
            ]  # 1: it comes from the receiver's left; -1: from its right
            found.append((f"{ring}_from_{side}", place[0], slots[ring][place]))
    return found


def _message(schedule: Schedule, done: Done) -> tuple[str, Place] | None:
    """(ring, place) where a result goes; None: nowhere."""
    target = schedule.to(done)
    if target is None:
        return None
    return "act" if done.kind == "F" else "grad", (target[0], Item(target[1], done.item.micro))

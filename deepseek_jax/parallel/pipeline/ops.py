"""What a pipeline schedule is made of: micro-batches on their way, ops, and where stages lie (`schedules.py` has them).

A *stage* is a run of layers, a *rank* an index along the mesh axis `pipe`, a *direction* one way through the stages; a
*chunk* is a stage that a rank holds.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Item(NamedTuple):
    """A micro-batch on its way in one direction. `micro` counts from 0 in each direction."""

    direction: int
    micro: int

    def __str__(self) -> str:
        return f"{self.direction}.{self.micro}"


class Op(NamedTuple):
    """What a rank does at one time: a forward, a backward, both, or weight gradients.

    Attributes:
        split: the backward makes gradients of inputs only; a later op makes those of weights.
    """

    forward: Item | None = None
    backward: Item | None = None
    weights: Item | None = None
    split: bool = False

    def __str__(self) -> str:
        parts = (("F", self.forward), ("Bi" if self.split else "B", self.backward), ("W", self.weights))
        return "&".join(f"{kind}{item}" for kind, item in parts if item is not None)


class Done(NamedTuple):
    """A forward ("F"), backward ("B"; gradients of inputs, at least) or weight gradient ("W") of a rank."""

    kind: str
    rank: int
    item: Item

    def __str__(self) -> str:
        return f"{self.kind}{self.item} of rank {self.rank}"


@dataclass(frozen=True)
class Schedule:
    """The ops of every rank, and how stages lie over ranks.

    Attributes:
        num_stages: num_ranks, or twice as many where each micro-batch passes every rank twice (DualPipeV).
        num_micro: micro-batches of a batch, of both directions together where they share them (DualPipe).
        ops: those of each rank, in the order in which it runs them.
        directions: ways through the stages, as many as a rank has chunks, that is, stages that it holds.
    """

    name: str
    num_ranks: int
    num_stages: int
    num_micro: int
    ops: tuple[tuple[Op, ...], ...]
    directions: int = 1

    @property
    def turns(self) -> bool:
        """Whether direction 0 goes on as direction 1 at the last rank."""
        return self.num_stages > self.num_ranks

    def micros(self, direction: int) -> int:
        """Micro-batches of a direction: half of them, the odd one in direction 0, where there are two starts."""
        shared = self.directions == 2 and not self.turns
        return (self.num_micro + 1 - direction) // 2 if shared else self.num_micro

    def stage(self, rank: int, direction: int) -> int:
        return self.num_stages - 1 - rank if direction else rank

    def chunk(self, rank: int, direction: int) -> int:
        """Which of the rank's chunks a direction passes: 0 for the lower of its stages."""
        return int(self.directions == 2 and self.stage(rank, direction) > self.stage(rank, 1 - direction))

    def after(self, rank: int, direction: int) -> tuple[int, int] | None:
        """(rank, direction) to which the result of a forward goes; None: the loss is here."""
        if self.stage(rank, direction) == self.num_stages - 1:
            return None
        if self.turns and direction == 0 and rank == self.num_ranks - 1:
            return rank, 1
        return (rank - 1 if direction else rank + 1), direction

    def before(self, rank: int, direction: int) -> tuple[int, int] | None:
        """(rank, direction) to which the result of a backward goes; None: the first stage."""
        if self.stage(rank, direction) == 0:
            return None
        if self.turns and direction == 1 and rank == self.num_ranks - 1:
            return rank, 0
        return (rank + 1 if direction else rank - 1), direction

    def needs(self, rank: int, op: Op) -> list[Done]:
        """What must be done before a rank can run an op, by itself or by the rank that sends to it."""
        found = []
        if op.forward is not None:
            found += self._sent("F", self.before(rank, op.forward.direction), op.forward.micro)
        if op.backward is not None:
            found += self._sent("B", self.after(rank, op.backward.direction), op.backward.micro)
            found.append(Done("F", rank, op.backward))
        if op.weights is not None:
            found.append(Done("B", rank, op.weights))
        return found

    def does(self, rank: int, op: Op) -> list[Done]:
        """What is done once a rank has run an op."""
        kinds = (("F", op.forward), ("B", op.backward), ("W", op.weights))
        return [Done(kind, rank, item) for kind, item in kinds if item is not None]

    def to(self, done: Done) -> tuple[int, int] | None:
        """(rank, direction) to which the result of a forward or backward goes; None: nowhere."""
        if done.kind == "W":
            return None
        return (self.after if done.kind == "F" else self.before)(done.rank, done.item.direction)

    @staticmethod
    def _sent(kind: str, source: tuple[int, int] | None, micro: int) -> list[Done]:
        return [] if source is None else [Done(kind, source[0], Item(source[1], micro))]

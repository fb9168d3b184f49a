"""Pipeline schedules as data: which rank runs which op in which order (report, section 3.2.1, table 2).

A *stage* is a run of layers, a *rank* an index along the mesh axis `pipe`, a *direction* one way through the stages.
`gpipe`, `one_f_one_b` and `zero_bubble` (ZB1P) have one direction and one stage per rank. In `dualpipe`, rank r of P
holds the stages r and P-1-r: half of the micro-batches travel from rank 0 on (direction 0), the others from rank P-1 on
(direction 1). In `dualpipe_v`, rank r of R holds the stages r and 2R-1-r: each micro-batch travels down as direction 0
and returns as direction 1.

    F0.3        forward of micro-batch 3 of direction 0
    B1.2        backward, gradients of inputs and of weights
    Bi0.1       backward, gradients of inputs only; those of weights wait in a queue, first in, first out, for W0.1
    F0.3&B1.0   a forward and a backward at once, the exchanges of one beside the arithmetic of the other
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, repeat

from deepseek_jax.parallel.pipeline.ops import Item, Op, Schedule


class _Rank:
    """Writes down the ops of one rank, and counts micro-batches.

    Where `queue` weight gradients wait already, a split backward becomes a full one; where none waits, `weights` does
    nothing. `phase` is a direction as seen by a rank of the first half; in the second half (`flip`), the other one.
    """

    def __init__(self, queue: int | None, flip: bool = False):
        self.ops: list[Op] = []
        self._queue, self._flip = queue, flip
        self._forwards, self._backwards = [0, 0], [0, 0]
        self._waiting: deque[Item] = deque()

    def _next(self, counts: list[int], phase: int) -> Item:
        direction = phase ^ self._flip
        counts[direction] += 1
        return Item(direction, counts[direction] - 1)

    def forward(self, phase: int = 0) -> None:
        self.ops.append(Op(forward=self._next(self._forwards, phase)))

    def backward(self, phase: int = 0, split: bool = False) -> None:
        item = self._next(self._backwards, phase)
        split = split and (self._queue is None or len(self._waiting) < self._queue)
        if split:
            self._waiting.append(item)
        self.ops.append(Op(backward=item, split=split))

    def pair(self, forward: int, backward: int) -> None:
        self.ops.append(Op(self._next(self._forwards, forward), self._next(self._backwards, backward)))

    def weights(self) -> None:
        if self._waiting:
            self.ops.append(Op(weights=self._waiting.popleft()))

    def rest_of_weights(self) -> None:
        while self._waiting:
            self.weights()


def gpipe(num_stages: int, num_micro: int, queue: int | None = None) -> Schedule:
    """All forwards, then all backwards. No weight gradient waits: any `queue` is deep enough.

    Raises:
        ValueError: a number is below 1 (`queue`: below 0).
    """
    _check("gpipe", num_stages, num_micro, queue)
    rank = _Rank(queue)
    for _ in range(num_micro):
        rank.forward()
    for _ in range(num_micro):
        rank.backward()
    return Schedule("gpipe", num_stages, num_stages, num_micro, (tuple(rank.ops),) * num_stages)


def one_f_one_b(num_stages: int, num_micro: int, queue: int | None = None) -> Schedule:
    """1F1B: a rank runs as many forwards ahead as there are ranks after it. No weight gradient waits.

    Raises:
        ValueError: a number is below 1 (`queue`: below 0).
    """
    _check("one_f_one_b", num_stages, num_micro, queue)

    def ops(r: int) -> tuple[Op, ...]:
        rank = _Rank(queue)
        for forward, backward in _one_by_one(num_stages - r - 1, num_micro):
            if forward:
                rank.forward()
            if backward:
                rank.backward()
        return tuple(rank.ops)

    return Schedule("one_f_one_b", num_stages, num_stages, num_micro, tuple(map(ops, range(num_stages))))


def zero_bubble(num_stages: int, num_micro: int, queue: int | None = None) -> Schedule:
    """ZB1P (Qi et al. 2023, ZB-H1): 1F1B, where the weight gradients of rank r lag r backwards behind.

    Gradients of inputs travel on sooner, and the weights of later ranks fill the wait at the end. No rank holds more
    micro-batches, those whose weight gradients wait included, than rank 0 does.

    Args:
        queue: weight gradients that may wait; default: r + 1 on rank r.

    Raises:
        ValueError: a number is below 1 (`queue`: below 0).
    """
    _check("zero_bubble", num_stages, num_micro, queue)

    def ops(r: int) -> tuple[Op, ...]:
        rank, done = _Rank(queue), 0
        for forward, backward in _one_by_one(num_stages - r - 1, num_micro):
            if forward:
                rank.forward()
            if backward:
                rank.backward(split=True)
                done += 1
                if done > r:
                    rank.weights()
        rank.rest_of_weights()
        return tuple(rank.ops)

    return Schedule("zero_bubble", num_stages, num_stages, num_micro, tuple(map(ops, range(num_stages))))


def dualpipe(num_stages: int, num_micro: int, queue: int | None = None) -> Schedule:
    """DualPipe: both ends feed micro-batches, and forwards of one direction run beside backwards of the other.

    Args:
        queue: weight gradients that may wait; default: as many as the schedule has.

    Raises:
        ValueError: an odd number of stages or of micro-batches, or fewer than 2 micro-batches per stage.
    """
    _check("dualpipe", num_stages, num_micro, queue)
    _check_even("dualpipe", "stages", num_stages)
    _check_even("dualpipe", "micro-batches", num_micro)
    _check_enough("dualpipe", num_micro, 2 * num_stages, f"2 per stage, of {num_stages} stages")
    half = num_stages // 2
    ops = tuple(
        _eight_steps(half, min(r, num_stages - 1 - r), num_micro // 2, _Rank(queue, flip=r >= half))
        for r in range(num_stages)
    )
    return Schedule("dualpipe", num_stages, num_stages, num_micro, ops, directions=2)


def dualpipe_v(num_ranks: int, num_micro: int, queue: int | None = None) -> Schedule:
    """DualPipeV: DualPipe's first half of ranks alone; the last of them hands over to itself.

    Args:
        num_ranks: half the number of stages.
        queue: weight gradients that may wait; default: as many as the schedule has.

    Raises:
        ValueError: fewer than 2 micro-batches per rank.
    """
    _check("dualpipe_v", num_ranks, num_micro, queue)
    _check_enough("dualpipe_v", num_micro, 2 * num_ranks, f"2 per rank, of {num_ranks} ranks")
    ops = tuple(_eight_steps(num_ranks, r, num_micro, _Rank(queue)) for r in range(num_ranks))
    return Schedule("dualpipe_v", num_ranks, 2 * num_ranks, num_micro, ops, directions=2)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    f.__name__: f for f in (gpipe, one_f_one_b, zero_bubble, dualpipe, dualpipe_v)
}


def forward_only(num_ranks: int, num_micro: int, like: str = "dualpipe") -> Schedule:
    """Forwards alone, for evaluation, with the stages where the schedule named `like` has them.

    A rank of two chunks begins with the direction whose start is nearer, and takes turns from when the other one's
    micro-batches arrive. An even number of them, at least one per rank, takes the shortest time that there is.

    Args:
        num_micro: at least 1; odd too.
        like: a name in `SCHEDULES`.

    Raises:
        ValueError: a number is below 1, ranks are odd in number for "dualpipe", or no schedule has that name.
    """
    if like not in SCHEDULES:
        raise ValueError(f"{like!r} is no schedule: {', '.join(SCHEDULES)}")
    _check("forward_only", num_ranks, num_micro, None)
    directions = 2 if like in ("dualpipe", "dualpipe_v") else 1
    if like == "dualpipe":
        _check_even("forward_only like dualpipe", "stages", num_ranks)
    num_stages = 2 * num_ranks if like == "dualpipe_v" else num_ranks
    empty = Schedule("forward_only", num_ranks, num_stages, num_micro, ((),) * num_ranks, directions)
    ops = tuple(tuple(Op(forward=item) for item in _arrivals(empty, r)) for r in range(num_ranks))
    return Schedule("forward_only", num_ranks, num_stages, num_micro, ops, directions)


# --- how the orders come about ----------------------------------------------------------------------------------------


def _arrivals(layout: Schedule, rank: int) -> list[Item]:
    """The items of a rank, by the ticks at which they can run there if no rank idles without need."""
    stages = [layout.stage(rank, d) for d in range(layout.directions)]
    near = stages.index(min(stages))
    alone = max(stages) - min(stages)  # ticks in which only the nearer direction has arrived

    def tick(item: Item) -> int:
        if item.direction != near:
            return alone + 2 * item.micro
        return item.micro if item.micro < alone else 2 * item.micro - alone + 1

    items = [Item(d, m) for d in range(layout.directions) for m in range(layout.micros(d))]
    return sorted(items, key=tick)


def _one_by_one(ahead: int, num_micro: int) -> Iterator[tuple[bool, bool]]:
    """1F1B's order, as (whether a forward comes, whether a backward comes after it)."""
    ahead = min(ahead, num_micro)
    return chain(
        repeat((True, False), ahead), repeat((True, True), num_micro - ahead), repeat((False, True), ahead)
    )


def _eight_steps(half: int, place: int, micros: int, rank: _Rank) -> tuple[Op, ...]:
    """DualPipe's order on one rank.

    Args:
        half: ranks on one side, where there are 2 * half stages.
        place: of the rank among them, 0 at the pipeline's end.
        micros: micro-batches per direction.
        rank: takes the ops.
    """
    inside = half - place - 1  # ranks between this one and the middle
    for _ in range(2 * inside):  # 1: forwards, until the other direction arrives
        rank.forward(0)
    for _ in range(place + 1):  # 2: forwards of both directions
        rank.forward(0)
        rank.forward(1)
    for _ in range(inside):  # 3: the first backwards; their weights fill the waits
        rank.backward(1, split=True)
        rank.weights()
        rank.forward(1)
    for i in range(micros - 2 * half + place + 1):  # 4: pairs
        if (
            i == 0 and not inside
        ):  # nothing to gain yet from a pair: the backward is what the neighbour waits for
            rank.forward(0)
            rank.backward(1)
        else:
            rank.pair(0, 1)
        rank.pair(1, 0)
    for _ in range(inside):  # 5: the last forwards
        rank.backward(1)
        rank.pair(1, 0)
    for i in range(2 * (place + 1)):  # 6: backwards of both directions, the later half without weights
        rank.backward(1 - i % 2, split=i > place)
    for _ in range(inside):  # 7: the last backwards; weights fill the waits
        rank.weights()
        rank.backward(0, split=True)
    rank.rest_of_weights()  # 8
    return tuple(rank.ops)


def _check(name: str, num_ranks: int, num_micro: int, queue: int | None) -> None:
    numbers = (
        ("ranks", num_ranks, 1),
        ("micro-batches", num_micro, 1),
        ("weight gradients in the queue", queue, 0),
    )
    for what, value, low in numbers:
        if value is not None and value < low:
            raise ValueError(f"{name}: {value} {what}, must be at least {low}")


def _check_even(name: str, what: str, value: int) -> None:
    if value % 2:
        raise ValueError(f"{name}: {value} {what}, must be even, for its two directions")


def _check_enough(name: str, num_micro: int, least: int, why: str) -> None:
    if num_micro < least:
        raise ValueError(f"{name}: {num_micro} micro-batches, must be at least {least}, {why}")

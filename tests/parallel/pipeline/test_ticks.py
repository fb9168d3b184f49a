"""The table of ticks, run by an interpreter over symbols: every value arrives, none is overwritten before it is read."""

from collections import Counter

import numpy as np
import pytest

from deepseek_jax.parallel.pipeline.schedules import SCHEDULES, dualpipe, forward_only
from deepseek_jax.parallel.pipeline.simulate import simulate
from deepseek_jax.parallel.pipeline.ticks import PROGRAMS, Rings, Ticks, table
from tests.parallel.pipeline.routes import KINDS, schedules


class Replay:
    """Runs a table on symbols. A forward appends its stage to what came, a backward its own to the gradient that came.

    Knows of the schedule how stages and micro-batches lie, and nothing of its order.
    """

    def __init__(self, name, table):
        self.name, self.table = name, table
        self.ranks = table.ticks.program.shape[1]
        self.stages = self.ranks * (2 if name == "dualpipe_v" else 1)
        self.rings = {
            ring: np.full((self.ranks, size), None, object) for ring, size in table.rings._asdict().items()
        }
        self.live = {ring: [0] * self.ranks for ring in Rings._fields}
        self.peak = dict.fromkeys(Rings._fields, 0)
        self.weights = Counter()  # (stage, input, gradient of the output)
        self.results = Counter()

    def stage(self, rank, direction):
        return self.stages - 1 - rank if direction else rank

    def batch(self, direction, micro):
        """Which micro-batch of the batch it is."""
        return (direction, micro) if self.name == "dualpipe" else micro

    def put(self, ring, rank, slot, value):
        assert 0 <= slot < self.rings[ring].shape[1]
        self.rings[ring][rank, slot] = value
        self.live[ring][rank] += 1
        self.peak[ring] = max(self.peak[ring], self.live[ring][rank])

    def take(self, ring, rank, slot):
        assert 0 <= slot < self.rings[ring].shape[1]
        self.live[ring][rank] -= 1
        return self.rings[ring][rank, slot]

    def run(self):
        for tick in range(len(self.table.ticks.program)):
            row = Ticks(*(column[tick].tolist() for column in self.table.ticks))
            sent = [self.op(rank, Ticks(*(column[rank] for column in row))) for rank in range(self.ranks)]
            for rank in range(self.ranks):
                for i, ring in enumerate(("act", "grad")):
                    for side, source in (("left", rank - 1), ("right", rank + 1), ("self", rank)):
                        slot = getattr(row, f"{ring}_from_{side}")[rank]
                        if slot >= 0:
                            self.put(ring, rank, slot, sent[source][i])
        return self

    def op(self, rank, do):
        """Returns the results of a forward and of a backward. A pair writes before it reads: the worst order."""
        has = PROGRAMS[do.program]
        assert ("F" in has, "B" in has, has == "W") == (
            do.forward_micro >= 0,
            do.backward_micro >= 0,
            do.weights_micro >= 0,
        )
        assert (do.backward_queue >= 0) == (has == "Bi")
        y = self.forward(rank, do) if "F" in has else None
        dx = self.backward(rank, do) if "B" in has else None
        if has == "W":
            direction, batch, *weights = self.take("queue", rank, do.weights_queue)
            assert direction == do.weights_direction
            assert batch == self.batch(direction, do.weights_micro)
            self.weights[self.stage(rank, direction), *weights] += 1
        return y, dx

    def forward(self, rank, do):
        stage, batch = (
            self.stage(rank, do.forward_direction),
            self.batch(do.forward_direction, do.forward_micro),
        )
        assert (do.forward_input < 0) == (stage == 0)
        x = (batch,) if stage == 0 else self.take("act", rank, do.forward_input)
        assert x == (batch, *range(stage))
        if do.forward_saved >= 0:
            self.put("saved", rank, do.forward_saved, x)
        if stage == self.stages - 1:
            self.results[batch] += 1
        return (*x, stage)

    def backward(self, rank, do):
        direction = do.backward_direction
        stage, batch = self.stage(rank, direction), self.batch(direction, do.backward_micro)
        assert (do.backward_grad < 0) == (stage == self.stages - 1)
        g = (batch,) if stage == self.stages - 1 else self.take("grad", rank, do.backward_grad)
        x = self.take("saved", rank, do.backward_saved)
        assert x == (batch, *range(stage))
        if do.backward_queue >= 0:
            self.put("queue", rank, do.backward_queue, (direction, batch, x, g))
        else:
            self.weights[stage, x, g] += 1
        return (*g, stage)


def batches(name, num_micro):
    if name != "dualpipe":
        return range(num_micro)
    return [(d, m) for d in (0, 1) for m in range((num_micro + 1 - d) // 2)]


@pytest.mark.parametrize(("name", "ranks"), KINDS)
def test_the_table_gives_every_weight_gradient_once_in_rings_as_small_as_can_be(name, ranks):
    for schedule in schedules(name, ranks):
        laid = table(schedule)
        replay = Replay(name, laid).run()
        stages = replay.stages
        assert replay.weights == Counter(
            (s, (b, *range(s)), (b, *range(stages - 1, s, -1)))
            for b in batches(name, schedule.num_micro)
            for s in range(stages)
        )
        assert replay.live == {ring: [0] * ranks for ring in Rings._fields}
        assert laid.rings._asdict() == replay.peak
        timeline = simulate(schedule, {"F": 1, "B": 2, "W": 1})
        assert (laid.rings.saved, laid.rings.queue) == (max(timeline.peak), max(timeline.queue))


@pytest.mark.parametrize(("name", "ranks"), KINDS)
def test_forwards_alone(name, ranks):
    for micro in (1, ranks, 2 * ranks + 1):
        laid = table(forward_only(ranks, micro, name))
        replay = Replay(name, laid).run()
        assert replay.results == Counter(batches(name, micro))
        assert laid.rings._asdict() == replay.peak and laid.rings[1:] == (0, 0, 0)
        assert set(np.unique(laid.ticks.program)) <= {0, 1}


def test_entries_are_int32_over_ticks_and_ranks():
    ticks, rings = table(dualpipe(8, 20))[1:]
    assert {(column.dtype, column.shape) for column in ticks} == {(np.dtype(np.int32), (38, 8))}
    assert rings == Rings(act=2, grad=2, saved=9, queue=4)


def test_one_stage_needs_no_messages():
    laid = table(SCHEDULES["gpipe"](1, 3))
    assert laid.rings == Rings(act=0, grad=0, saved=3, queue=0)
    assert len(laid.ticks.program) == 6


@pytest.mark.parametrize(
    "entry", ["forward_saved", "backward_grad", "act_from_left", "weights_queue", "backward_saved"]
)
def test_the_interpreter_notices_a_wrong_slot(entry):
    laid = table(dualpipe(4, 8))
    column = getattr(laid.ticks, entry).copy()
    tick, rank = np.argwhere(column >= 0)[len(np.argwhere(column >= 0)) // 2]
    column[tick, rank] = (column[tick, rank] + 1) % max(2, laid.rings.saved if "saved" in entry else 2)
    with pytest.raises(AssertionError):
        replay = Replay("dualpipe", laid._replace(ticks=laid.ticks._replace(**{entry: column}))).run()
        assert len(replay.weights) == sum(replay.weights.values()) == 4 * 8

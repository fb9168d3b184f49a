"""Orders of ops: DeepSeek's for 8 stages and 20 micro-batches, and what holds for every schedule."""

from itertools import accumulate

import pytest

from deepseek_jax.parallel.pipeline.ops import Op
from deepseek_jax.parallel.pipeline.schedules import (
    SCHEDULES,
    dualpipe,
    dualpipe_v,
    forward_only,
    gpipe,
    one_f_one_b,
    zero_bubble,
)
from deepseek_jax.parallel.pipeline.simulate import simulate
from tests.parallel.pipeline.routes import HELD_BACK, KINDS, RANKS, schedules

# The outermost and the innermost rank of PP = 8, N = 20, by the eight steps of DualPipe's `step`.
OUTER = """F0.0 F0.1 F0.2 F0.3 F0.4 F0.5 F0.6 F1.0 Bi1.0 W1.0 F1.1 Bi1.1 W1.1 F1.2 Bi1.2 W1.2 F1.3
F0.7&B1.3 F1.4&B0.0 F0.8&B1.4 F1.5&B0.1 F0.9&B1.5 F1.6&B0.2 B1.6 F1.7&B0.3 B1.7 F1.8&B0.4 B1.8 F1.9&B0.5
B1.9 Bi0.6 W0.6 Bi0.7 W0.7 Bi0.8 W0.8 Bi0.9 W0.9"""
INNER = """F0.0 F1.0 F0.1 F1.1 F0.2 F1.2 F0.3 F1.3 F0.4 B1.0 F1.4&B0.0 F0.5&B1.1 F1.5&B0.1 F0.6&B1.2 F1.6&B0.2
F0.7&B1.3 F1.7&B0.3 F0.8&B1.4 F1.8&B0.4 F0.9&B1.5 F1.9&B0.5 B1.6 B0.6 B1.7 B0.7 Bi1.8 Bi0.8 Bi1.9 Bi0.9
W1.8 W0.8 W1.9 W0.9"""


def text(ops):
    return " ".join(map(str, ops))


def test_dualpipe_of_8_stages_and_20_micro_batches_is_deepseeks():
    ops = dualpipe(8, 20).ops
    assert text(ops[0]) == " ".join(OUTER.split())
    assert text(ops[3]) == " ".join(INNER.split())
    assert [len(rank) for rank in ops] == [38, 36, 34, 33, 33, 34, 36, 38]


def other_way(op):
    """The op with directions swapped."""
    items = [item and item._replace(direction=1 - item.direction) for item in op[:3]]
    return Op(*items, op.split)


@pytest.mark.parametrize("ranks", RANKS)
def test_dualpipe_is_its_own_mirror_and_its_first_half_is_dualpipe_v(ranks):
    ops = dualpipe(2 * ranks, 4 * ranks).ops
    assert tuple(tuple(map(other_way, rank)) for rank in reversed(ops)) == ops
    assert dualpipe_v(ranks, 2 * ranks).ops == ops[:ranks]


def test_the_known_orders_of_four_stages():
    assert text(gpipe(2, 3).ops[1]) == "F0.0 F0.1 F0.2 B0.0 B0.1 B0.2"
    assert text(one_f_one_b(4, 5).ops[2]) == "F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 F0.4 B0.3 B0.4"
    first, *_, last = zero_bubble(4, 5).ops
    assert text(first) == ("F0.0 F0.1 F0.2 F0.3 Bi0.0 W0.0 F0.4 Bi0.1 W0.1 Bi0.2 W0.2 Bi0.3 W0.3 Bi0.4 W0.4")
    assert text(last) == ("F0.0 Bi0.0 F0.1 Bi0.1 F0.2 Bi0.2 F0.3 Bi0.3 W0.0 F0.4 Bi0.4 W0.1 W0.2 W0.3 W0.4")
    assert text(dualpipe_v(1, 2).ops[0]) == "F0.0 F1.0 F0.1 B1.0 F1.1&B0.0 B1.1 Bi0.1 W0.1"


@pytest.mark.parametrize(("name", "ranks"), KINDS)
def test_every_rank_runs_each_micro_batch_once_and_in_order(name, ranks):
    """Forward, backward, and weight gradients where the backward was split, first in, first out."""
    for schedule in schedules(name, ranks):
        items = {(d, m) for d in range(schedule.directions) for m in range(schedule.micros(d))}
        assert len(items) == schedule.num_micro * (2 if name == "dualpipe_v" else 1)
        for ops in schedule.ops:
            forwards = [op.forward for op in ops if op.forward is not None]
            backwards = [op.backward for op in ops if op.backward is not None]
            assert len(forwards) == len(backwards) == len(items)
            assert set(forwards) == set(backwards) == items
            for d in range(schedule.directions):
                for done in (forwards, backwards):
                    assert [m for e, m in done if e == d] == list(range(schedule.micros(d)))
            weights = [op.weights for op in ops if op.weights is not None]
            assert weights == [op.backward for op in ops if op.split]


def most_waiting(ops):
    return max(accumulate(op.split - bool(op.weights) for op in ops))


@pytest.mark.parametrize("name", HELD_BACK)
@pytest.mark.parametrize("ranks", RANKS)
def test_a_full_queue_makes_backwards_whole(name, ranks):
    micro = 2 * ranks + 2
    free = SCHEDULES[name](ranks, micro)
    for depth in (0, 1, 2):
        schedule = SCHEDULES[name](ranks, micro, depth)
        for ops, unbounded in zip(schedule.ops, free.ops, strict=True):
            assert most_waiting(ops) == min(depth, most_waiting(unbounded))
            assert [(op.forward, op.backward) for op in ops if not op.weights] == [
                (op.forward, op.backward) for op in unbounded if not op.weights
            ]


@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_of_zero_bubble_holds_as_much_as_the_first(ranks):
    """Micro-batches from their forward to their weight gradients."""
    held = [
        max(accumulate(bool(op.forward) - bool(op.weights) for op in ops))
        for ops in zero_bubble(ranks, 2 * ranks).ops
    ]
    assert held == [ranks] * ranks


@pytest.mark.parametrize(("name", "ranks"), KINDS)
def test_a_micro_batch_passes_all_stages_and_back(name, ranks):
    schedule = SCHEDULES[name](ranks, 2 * ranks)
    starts = {"dualpipe": [(0, 0), (ranks - 1, 1)]}.get(name, [(0, 0)])
    for start in starts:
        way = [start]
        while (after := schedule.after(*way[-1])) is not None:
            assert schedule.before(*after) == way[-1]
            way.append(after)
        assert schedule.before(*start) is None
        assert [schedule.stage(*place) for place in way] == list(range(schedule.num_stages))
    for rank in range(ranks):
        held = [schedule.stage(rank, d) for d in range(schedule.directions)]
        assert [sorted(held).index(stage) for stage in held] == [
            schedule.chunk(rank, d) for d in range(schedule.directions)
        ]


@pytest.mark.parametrize(("name", "ranks"), KINDS)
def test_forwards_alone_are_as_dense_as_their_way_allows(name, ranks):
    """From the first start, a rank of DualPipe's middle waits half of the others' way, and so do its results."""
    for micro in (1, 2, ranks, 2 * ranks, 2 * ranks + 1):
        schedule = forward_only(ranks, micro, name)
        training = SCHEDULES[name](ranks, 2 * ranks)
        assert (schedule.num_stages, schedule.directions) == (training.num_stages, training.directions)
        for ops in schedule.ops:
            items = {(d, m) for d in range(schedule.directions) for m in range(schedule.micros(d))}
            assert len(ops) == len(items) and {op.forward for op in ops} == items
            assert not any(op.backward or op.weights for op in ops)
        ticks = simulate(schedule, {"F": 1, "B": 2, "W": 1}).makespan
        if micro >= ranks and (name != "dualpipe" or micro % 2 == 0):
            way = {"dualpipe": ranks - 2, "dualpipe_v": 2 * ranks - 2}.get(name, ranks - 1)
            assert ticks == micro * (2 if name == "dualpipe_v" else 1) + way


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="dualpipe: 7 stages, must be even"):
        dualpipe(7, 20)
    with pytest.raises(ValueError, match="dualpipe: 21 micro-batches, must be even"):
        dualpipe(8, 21)
    with pytest.raises(
        ValueError, match="dualpipe: 14 micro-batches, must be at least 16, 2 per stage, of 8"
    ):
        dualpipe(8, 14)
    with pytest.raises(ValueError, match="dualpipe_v: 7 micro-batches, must be at least 8, 2 per rank, of 4"):
        dualpipe_v(4, 7)
    with pytest.raises(ValueError, match="forward_only like dualpipe: 3 stages, must be even"):
        forward_only(3, 4)
    with pytest.raises(
        ValueError, match="'chimera' is no schedule: gpipe, one_f_one_b, zero_bubble, dualpipe"
    ):
        forward_only(4, 4, "chimera")
    for name, build in SCHEDULES.items():
        with pytest.raises(ValueError, match=f"{name}: 0 ranks, must be at least 1"):
            build(0, 4)
        with pytest.raises(ValueError, match=f"{name}: -2 micro-batches, must be at least 1"):
            build(2, -2)
        with pytest.raises(ValueError, match=f"{name}: -1 weight gradients in the queue, must be at least 0"):
            build(2, 4, -1)

"""Makespans, bubbles and peaks: DeepSeek's figures, the formulas of table 2, small cases by hand."""

import numpy as np
import pytest

from deepseek_jax.parallel.pipeline.ops import Item, Op, Schedule
from deepseek_jax.parallel.pipeline.schedules import (
    dualpipe,
    dualpipe_v,
    forward_only,
    gpipe,
    one_f_one_b,
    zero_bubble,
)
from deepseek_jax.parallel.pipeline.simulate import simulate, synchronous
from deepseek_jax.parallel.pipeline.ticks import PROGRAMS, table
from tests.parallel.pipeline.routes import KINDS, schedules

EVEN = {"F": 1, "B": 2, "W": 1, "F&B": 3}
STAGES = range(2, 33, 2)


@pytest.mark.parametrize(
    ("stages", "micro", "makespan", "bubble"),
    [
        *((8, 20, 66, 6), (8, 16, 54, 6), (8, 40, 126, 6), (4, 8, 26, 2), (2, 4, 12, 0)),
        *((16, 32, 110, 14), (16, 120, 374, 14)),
    ],
)
def test_dualpipe(stages, micro, makespan, bubble):
    timeline = simulate(dualpipe(stages, micro), EVEN)
    assert timeline.makespan == makespan
    assert timeline.bubble == (bubble,) * stages
    assert timeline.peak == (stages + 1,) * stages
    assert max(timeline.queue) == stages // 2


@pytest.mark.parametrize(
    ("ranks", "micro", "makespan", "bubble"), [(4, 10, 66, 6), (8, 20, 134, 14), (4, 8, 54, 6)]
)
def test_dualpipe_v(ranks, micro, makespan, bubble):
    timeline = simulate(dualpipe_v(ranks, micro), EVEN)
    assert timeline.makespan == makespan
    assert timeline.bubble == (bubble,) * ranks
    assert timeline.peak == (2 * ranks + 1,) * ranks


def test_pairs_that_overlap_shorten_it():
    timeline = simulate(dualpipe(8, 20), EVEN | {"F&B": 2.5})
    assert (timeline.makespan, max(timeline.bubble), min(timeline.bubble)) == (59, 4.5, 3.5)


def test_the_formula_bounds_costs_that_do_not_fit_each_other():
    costs = {"F": 1, "B": 2.2, "W": 0.8, "F&B": 2.6}
    bubble = max(simulate(dualpipe(8, 20), costs).bubble)
    assert bubble == pytest.approx(6.2, abs=1e-9) and bubble < 3 * (2.6 + 2.2 - 3 * 0.8) == pytest.approx(7.2)


@pytest.mark.parametrize("stages", STAGES)
def test_bubbles_and_activations_of_table_2(stages):
    f, b, w, pair = EVEN.values()
    dual = (stages // 2 - 1) * (pair + b - 3 * w)
    micro = 2 * stages
    for schedule, bubble, peak in (
        (one_f_one_b(stages, micro), (stages - 1) * (f + b), stages),
        (zero_bubble(stages, micro), (stages - 1) * (f + b - 2 * w), stages),
        (dualpipe(stages, micro), dual, stages + 1),
        (dualpipe_v(stages // 2, micro), dual, stages + 1),
    ):
        timeline = simulate(schedule, EVEN)
        assert timeline.bubble == (bubble,) * schedule.num_ranks
        assert max(timeline.peak) == peak
        assert min(timeline.peak) == (peak if schedule.directions == 2 else 1)


def test_gpipe_has_the_bubble_of_1f1b_and_keeps_everything():
    timeline = simulate(gpipe(8, 20), EVEN)
    assert timeline.bubble == (21,) * 8 and timeline.peak == (20,) * 8


def test_a_shallow_queue_costs_little():
    """PP16, 120 micro-batches: of 374 units, depth 1 costs 2%."""
    worst = {depth: max(simulate(dualpipe(16, 120, depth), EVEN).bubble) for depth in (8, 4, 2, 1, 0)}
    assert worst == {8: 14, 4: 18, 2: 20, 1: 21, 0: 34}


def test_costs_of_stages_and_messages_by_hand():
    """F0 0-1, message, F1 1.5-4.5, B1 4.5-8.5, message, B0 9-11."""
    costs = {"F": [1, 3], "B": {1: 4, 0: 2}, "W": np.array([1, 1]), "hop": 0.5}
    timeline = simulate(one_f_one_b(2, 1), costs)
    assert timeline.makespan == 11 and timeline.busy == (3, 7) and timeline.bubble == (8, 4)
    assert [(event.rank, event.start, event.end) for event in timeline.events] == [
        *((0, 0, 1), (1, 1.5, 4.5), (1, 4.5, 8.5), (0, 9, 11))
    ]
    # Input gradients take B - W, unless they are given.
    assert simulate(zero_bubble(2, 1), costs).makespan == 1 + 0.5 + 3 + 3 + 0.5 + 1 + 1
    assert simulate(zero_bubble(2, 1), costs | {"Bi": [0.25, 5]}).makespan == 1 + 0.5 + 3 + 5 + 0.5 + 0.25 + 1


def test_the_turn_of_dualpipe_v_takes_no_message():
    assert simulate(forward_only(2, 1, "dualpipe_v"), EVEN | {"hop": 0.5}).makespan == 4 + 2 * 0.5


def test_a_pair_costs_by_its_two_stages():
    """Ranks take turns: the forward of stage 1 beside the backward of stage 0, then that of 0 beside that of 1."""

    def spent(schedule, costs):
        pairs = [e for e in simulate(schedule, costs).events if e.op.forward and e.op.backward]
        return [[e.end - e.start for e in pairs if e.rank == r] for r in range(2)]

    assert spent(dualpipe(2, 6), EVEN | {"F&B": [[100, 7], [5, 100]]}) == [[5, 7, 5]] * 2
    assert spent(dualpipe(2, 6), {"F": [1, 2], "B": [3, 5], "W": 1}) == [[2 + 3, 1 + 5, 2 + 3]] * 2


@pytest.mark.parametrize(("name", "ranks"), KINDS)
def test_ticks_that_wait_for_each_other(name, ranks):
    """Against the table: from one tick that sends to the next, the time of the rank that has most to do."""
    cost = dict(zip(PROGRAMS, (0, 1, 2, 1, 1, 3), strict=True))
    for schedule in schedules(name, ranks)[::3]:
        ticks = table(schedule).ticks
        spent = np.array(list(cost.values()))[ticks.program]
        sends = np.any(
            [v >= 0 for k, v in ticks._asdict().items() if k.endswith(("_left", "_right"))], (0, 2)
        )
        starts = [0, *(np.flatnonzero(sends[:-1]) + 1)]
        expected = np.add.reduceat(spent, starts).max(-1).sum()
        timeline = synchronous(schedule, EVEN)
        assert timeline.makespan == expected >= simulate(schedule, EVEN).makespan
        assert timeline.busy == tuple(spent.sum(0))


def test_messages_of_ticks_take_time():
    assert synchronous(gpipe(2, 1), EVEN | {"hop": 0.5}).makespan == 2 * 1 + 2 * 2 + 2 * 0.5


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"F": 1, "B": 2}, r"\['W'\] missing"),
        (EVEN | {"FB": 3}, r"costs of \['FB'\]: the known ones are"),
        (EVEN | {"F": -1}, "costs of F are -1.0, must be finite"),
        (EVEN | {"Bi": float("nan")}, "costs of Bi are nan"),
        ({"F": 1, "B": 1, "W": 2}, "costs of Bi are .*-1.0.*, must be finite and not negative"),
        (EVEN | {"W": [1, 2, 3]}, r"costs of W have the shape \(3,\), must be a number or \(4,\)"),
        (EVEN | {"B": {0: 1, 4: 1}}, r"costs of B over the stages \[0, 4\], must be 0 to 3"),
        (EVEN | {"F&B": [1, 2, 3, 4]}, r"costs of F&B have the shape \(4,\)"),
        (EVEN | {"hop": [1, 2]}, "costs of hop have the shape"),
    ],
)
def test_wrong_costs_are_refused(costs, message):
    with pytest.raises(ValueError, match=message):
        simulate(dualpipe(4, 8), costs)


def test_what_cannot_run_is_said():
    forward, backward = Op(forward=Item(0, 0)), Op(backward=Item(0, 0))

    def run(*ops):
        return simulate(Schedule("mine", 2, 2, 1, ops), EVEN)

    with pytest.raises(
        ValueError, match=r"mine: rank 1 waits before F0\.0 for F0\.0 of rank 0, which never comes"
    ):
        run((), (forward, backward))
    with pytest.raises(ValueError, match=r"rank 0 waits before B0\.0 for B0\.0 of rank 1"):
        run((forward, backward), (backward, forward))
    with pytest.raises(ValueError, match=r"F0\.0 of rank 0 comes twice"):
        run((forward, forward), ())
    with pytest.raises(ValueError, match=r"rank 0 waits before W0\.0 for B0\.0 of rank 0"):
        run((forward, Op(weights=Item(0, 0))), ())

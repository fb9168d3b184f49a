"""Schedules as lists of strings."""

import pytest

from deepseek_jax.parallel import schedule
from deepseek_jax.parallel.pipeline import schedules
from tests.parallel.pipeline.routes import KINDS

EVEN = {"F": 1, "B": 2, "W": 1, "F&B": 3}


def test_dualpipe_in_the_papers_notation():
    lists = schedule.dualpipe(8, 20)
    assert [len(ops) for ops in lists] == [38, 36, 34, 33, 33, 34, 36, 38]
    assert lists[7][:8] == ["F1.0", "F1.1", "F1.2", "F1.3", "F1.4", "F1.5", "F1.6", "F0.0"]
    assert lists[3][9:11] == ["B1.0", "F1.4&B0.0"] and lists[3][-8:-4] == ["Bi1.8", "Bi0.8", "Bi1.9", "Bi0.9"]
    makespan, bubble, peak = schedule.simulate(lists, EVEN)
    assert (makespan, set(bubble), set(peak)) == (66, {6}, {9})
    assert schedule.simulate(schedule.dualpipe_v(4, 10), EVEN).bubble == (6,) * 4
    assert schedule.simulate(schedules.zero_bubble(8, 16), EVEN).bubble == (7,) * 8


@pytest.mark.parametrize(("name", "ranks"), KINDS)
def test_lists_say_all_of_a_schedule(name, ranks):
    built = schedules.SCHEDULES[name](ranks, 2 * ranks)
    lists = getattr(schedule, name)(ranks, 2 * ranks)
    read = schedule.from_lists(lists)
    assert schedule.as_lists(read) == lists
    assert (read.ops, read.num_ranks, read.num_stages, read.num_micro, read.directions) == (
        *(built.ops, built.num_ranks, built.num_stages, built.num_micro, built.directions),
    )


@pytest.mark.parametrize(
    "op", ["", "F0", "F2.0", "X0.1", "F0.1&", "B0.1&F1.0", "F0.1&F0.2", "Bi0.1&B0.1", "F0.01"]
)
def test_what_is_no_op_is_refused(op):
    with pytest.raises(ValueError, match="is no op, such as"):
        schedule.from_lists([["F0.0", op]])


def test_no_ranks_are_refused():
    with pytest.raises(ValueError, match="no ranks"):
        schedule.simulate([], EVEN)

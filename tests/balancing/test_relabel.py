"""Renamed slots: few experts move, from near by."""

import numpy as np
import pytest

from deepseek_jax.balancing.moves import Moves, count, sources
from deepseek_jax.balancing.plan import Plan
from deepseek_jax.balancing.relabel import relabelled


def plan(*physical):
    return Plan(np.array(physical, np.int32))


def moves(new, old, gpus, nodes):
    return count(sources(new, old, gpus, nodes), gpus, nodes)


OLD = plan([0, 1, 2, 3, 4, 5, 6, 7])


@pytest.mark.parametrize(
    "new",
    [
        [1, 0, 3, 2, 5, 4, 7, 6],  # slots of GPUs
        [2, 3, 0, 1, 6, 7, 4, 5],  # GPUs of nodes
        [4, 5, 6, 7, 0, 1, 2, 3],  # nodes
        [7, 6, 5, 4, 3, 2, 1, 0],  # all three
    ],
)
def test_the_same_under_other_names_moves_nothing(new):
    assert moves(plan(new), OLD, 4, 2).moved > 0
    named = relabelled(plan(new), OLD, 4, 2)
    np.testing.assert_array_equal(named.physical_lp, OLD.physical_lp)
    assert moves(named, OLD, 4, 2) == Moves(8, 0, 0, 0)


def test_groups_stay_on_their_node_unless_they_need_not():
    """GPUs of two nodes trade places: that cannot be undone where nodes keep what they hold."""
    new = plan([0, 1, 6, 7, 4, 5, 2, 3])
    kept = relabelled(new, OLD, 4, 2)
    assert moves(kept, OLD, 4, 2) == Moves(4, 0, 0, 4)
    free = relabelled(new, OLD, 4, 2, together=False)
    np.testing.assert_array_equal(free.physical_lp, OLD.physical_lp)


def test_nodes_trade_names_only_where_fewer_cross():
    """Half of each node's experts cross either way: nodes keep their names, though on the GPUs nothing would stay."""
    new = plan([4, 5, 0, 1, 6, 7, 2, 3])
    named = relabelled(new, OLD, 4, 2)
    assert sorted(named.physical_lp[0, :4]) == [0, 1, 4, 5]
    assert moves(named, OLD, 4, 2) == Moves(4, 0, 0, 4)


def test_layers_are_named_apart():
    old = Plan(np.tile(OLD.physical_lp, (2, 1)))
    new = plan([2, 3, 0, 1, 4, 5, 6, 7], [0, 1, 2, 3, 7, 6, 4, 5])
    assert moves(relabelled(new, old, 4, 2), old, 4, 2) == Moves(16, 0, 0, 0)


def test_a_second_copy_on_a_gpu_is_copied_there():
    old, new = plan([0, 1, 2, 3, 0, 1]), plan([0, 0, 1, 1, 2, 3])
    named = relabelled(new, old, 3, 1)
    assert sorted(map(tuple, np.sort(named.physical_lp.reshape(3, 2)).tolist())) == [(0, 0), (1, 1), (2, 3)]
    assert moves(named, old, 3, 1) == Moves(4, 2, 0, 0)


def test_the_nearest_copy_is_read_and_several_in_turn():
    old = plan([0, 1, 0, 2, 0, 3, 0, 4])  # four GPUs of two slots, two nodes
    new = plan([0, 0, 2, 0, 0, 1, 0, 0])
    got = sources(new, old, 4, 2)[0].tolist()
    assert got == [0, 0, 3, 2, 4, 1, 6, 6]
    assert count(np.array([got]), 4, 2) == Moves(3, 4, 0, 1)
    far = sources(plan([1, 0, 2, 3, 4, 0, 0, 0]), plan([0, 0, 0, 0, 1, 2, 3, 4]), 2, 2)[0]
    assert far.tolist()[5:] == [1, 2, 3]  # three slots of the other node read three copies


def test_plans_with_nothing_in_common_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 6\) and \(1, 8\) \[layers, slots\] have no slots in common"):
        relabelled(plan([0, 1, 2, 3, 4, 5]), OLD, 2, 1)
    with pytest.raises(ValueError, match="8 slots do not divide over 3 GPUs"):
        relabelled(OLD, OLD, 3, 1)
    with pytest.raises(ValueError, match="4 GPUs do not divide over 3 nodes"):
        relabelled(OLD, OLD, 4, 3)

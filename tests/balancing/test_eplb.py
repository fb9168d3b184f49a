"""EPLB on the vectors of DeepSeek's repository (README, and the same loads by the global policy), and what it refuses."""

import numpy as np
import pytest

from deepseek_jax.balancing.eplb import even, planned, rebalance_experts
from deepseek_jax.balancing.plan import Plan, Unit, balance, loads_of_gpus

LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]

HIERARCHICAL = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
GLOBAL = [
    [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
    [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
]
SLOTS_OF = [
    [[12, -1], [15, 13], [11, -1], [6, -1], [7, 5], [0, 2], [1, -1], [3, -1], [4, -1], [9, -1], [8, 10], [14, -1]],
    [[13, -1], [15, 11], [8, -1], [14, -1], [9, -1], [10, 12], [2, 4], [0, -1], [6, 3], [7, -1], [1, -1], [5, -1]],
]  # fmt: skip
COPIES = [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]


def loads(plan):
    return loads_of_gpus(Plan(plan), LOADS, 8)


def test_hierarchical_vector():
    phy2log, log2phy, logcnt = rebalance_experts(LOADS, 16, 4, 2, 8)
    np.testing.assert_array_equal(phy2log, HIERARCHICAL)
    np.testing.assert_array_equal(log2phy, SLOTS_OF)
    np.testing.assert_array_equal(logcnt, COPIES)
    want = [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152], [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5]
    np.testing.assert_array_equal(loads(phy2log), want)
    assert [round(balance(load[None]), 4) for load in loads(phy2log)] == [0.8277, 0.8050]


@pytest.mark.parametrize("groups, nodes", [(4, 3), (1, 1)])
def test_global_vector(groups, nodes):
    phy2log, log2phy, logcnt = rebalance_experts(LOADS, 16, groups, nodes, 8)
    np.testing.assert_array_equal(phy2log, GLOBAL)
    want = [130.5, 95.5, 130, 138, 138.5, 134.5, 134, 132], [123, 123, 125.5, 118.5, 172, 157.5, 172, 164.5]
    np.testing.assert_array_equal(loads(phy2log), want)
    assert [round(balance(load[None]), 4) for load in loads(phy2log)] == [0.9323, 0.8401]
    assert sorted(log2phy[0, 1]) == [14, 15] == np.flatnonzero(phy2log[0] == 1).tolist()  # both on GPU 7
    assert logcnt.sum(1).tolist() == [16, 16]


def test_as_many_packs_as_items_are_not_sorted():
    phy2log, _, logcnt = rebalance_experts([[3, 1, 9, 2]], 4, 2, 2, 4)
    assert phy2log.tolist() == [[0, 1, 2, 3]] and (logcnt == 1).all()


def test_of_equals_the_first_comes_first():
    assert rebalance_experts(np.ones((1, 4)), 6, 1, 1, 3)[0].tolist() == [[2, 0, 3, 1, 0, 1]]


def test_loads_are_float32():
    """2^24 and 2^24 + 1 are equals, of which the first gets the copy."""
    assert rebalance_experts([[2**24, 2**24 + 1]], 3, 1, 1, 1)[2].tolist() == [[2, 1]]


def test_a_plan_says_the_same_of_copies_as_the_planner():
    phy2log, log2phy, logcnt = rebalance_experts(LOADS, 16, 4, 2, 8)
    made = Plan(phy2log).checked(12, 16)
    np.testing.assert_array_equal(made.logcnt, logcnt)
    np.testing.assert_array_equal(np.sort(made.log2phy, 2), np.sort(log2phy, 2))
    np.testing.assert_array_equal(made.copies(5)[..., :2], made.log2phy)
    assert (made.copies(5)[..., 2:] == -1).all() and made.experts == 12


def test_the_first_plan_keeps_groups_on_nodes():
    first = even(2, 256, Unit(288, 8, 4, 32))
    node_of = first.log2phy // (288 // 4)
    on = [{n for n in node_of[0, group * 32 : group * 32 + 32].ravel() if n >= 0} for group in range(8)]
    assert all(len(nodes) == 1 for nodes in on) and first.logcnt.max() == 2


def test_a_layer_without_load_is_planned_evenly():
    made = planned([[0] * 12, LOADS[0]], Unit(16, 4, 2, 8))
    np.testing.assert_array_equal(made.physical_lp[0], even(1, 12, Unit(16, 4, 2, 8)).physical_lp[0])
    np.testing.assert_array_equal(made.physical_lp[1], HIERARCHICAL[0])
    assert made.logcnt[0].max() == 2


@pytest.mark.parametrize(
    "loads, unit, words",
    [
        (LOADS, (11, 4, 2, 1), "11 slots have no room for 12 experts"),
        (LOADS, (18, 4, 2, 8), "18 slots do not divide over 8 GPUs; 16 or 24 do"),
        (LOADS, (18, 4, 2, 9), "9 GPUs do not divide over 2 nodes"),
        (LOADS, (16, 8, 2, 8), "12 experts do not divide into 8 groups"),
        (LOADS, (16, 4, 0, 8), "nodes=0 must be a positive integer"),
        (LOADS, (16.0, 4, 2, 8), "slots=16.0 must be a positive integer"),
        ([1, 2], (2, 1, 1, 1), r"loads of shape \(2,\)"),
        ([[1, float("nan")]], (2, 1, 1, 1), "a load is nan"),
        ([[1, -2]], (2, 1, 1, 1), "a load is -2.0"),
        ([[1, float("inf")]], (2, 1, 1, 1), "a load is inf"),
        ([[3e38, 3e38]], (2, 1, 1, 1), "loads of layer 0 sum to more than float32 holds"),
    ],
)
def test_what_does_not_fit_is_said(loads, unit, words):
    with pytest.raises(ValueError, match=words):
        rebalance_experts(loads, *unit)


def plan(*physical):
    return Plan(np.array(physical, np.int32))


def test_a_plan_that_lacks_an_expert_is_refused():
    with pytest.raises(ValueError, match="layer 1 has no slot for expert 1"):
        plan([0, 1, 2, 1], [0, 2, 2, 0]).checked(3, 4)
    with pytest.raises(ValueError, match="layer 0 has no slot for expert 3"):
        plan([0, 1, 2, 1]).checked(4, 4)
    with pytest.raises(ValueError, match="the plan names experts 0 to 2 of 2"):
        plan([0, 1, 2, 1]).checked(2, 4)
    with pytest.raises(ValueError, match=r"shape \(1, 4\) should be \[layers, 8 slots\]"):
        plan([0, 1, 2, 1]).checked(3, 8)
    with pytest.raises(ValueError, match="2 copies, more than 1"):
        plan([0, 1, 2, 1]).copies(1)

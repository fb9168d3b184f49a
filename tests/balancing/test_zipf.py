"""Redundant experts even out a Zipf load, through the placement that serving uses."""

import numpy as np
import pytest

from deepseek_jax.balancing.eplb import rebalance_experts
from deepseek_jax.balancing.plan import Plan
from tests.balancing import zipf


@pytest.mark.parametrize("grouped", [False, True])
def test_a_zipf_load_is_even_with_32_redundant_experts(grouped):
    """256 experts, 8 per token, 32 GPUs with 9 each, and with 256 tokens of their own; plan and measurement on different tokens."""
    (alone, redundant) = zipf.measured(0, 32, 256, grouped, (zipf.GLOBAL,))
    assert (alone > 2).all() and (redundant <= 1.15).all(), (alone, redundant)


def test_copies_on_one_gpu_are_both_filled():
    """The global vector's expert 1, twice on GPU 7."""
    loads = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]]
    plan = Plan(rebalance_experts(loads, 16, 1, 1, 8)[0])
    assert plan.physical_lp[0, 14:].tolist() == [1, 1]
    rows = np.bincount(zipf.sent(plan, np.ones((5, 7, 1), np.int32)).ravel(), minlength=16)
    assert rows[:14].sum() == 0 and sorted(rows[14:]) == [17, 18]


def test_devices_with_a_token_each_fill_all_copies():
    """Each begins with another copy: if all began with the first, that one would get all rows of decoding."""
    plan = Plan(np.array([[0, 1, 0, 2, 0, 3]], np.int32))
    rows = np.bincount(zipf.sent(plan, np.zeros((32, 1, 1), np.int32)).ravel(), minlength=6)
    assert rows.tolist() == [11, 0, 11, 0, 10, 0]


def test_room_for_more_copies_changes_nothing():
    plan = Plan(np.array([[0, 1, 0, 2], [2, 1, 0, 1]], np.int32))
    ids = np.array([[[0, 1], [0, 2], [1, -1], [0, 7]]], np.int32)
    for layer in range(2):
        np.testing.assert_array_equal(*(zipf.sent(plan, ids, layer, most) for most in (2, 4)))

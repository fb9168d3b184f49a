"""Advantages against known values; equal rewards, missing ones and rounding."""

import numpy as np
import pytest

from deepseek_jax.posttraining.advantages import group_advantages, silent

R = np.array([[1, 0, 0, 1, 0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("scale", "good", "bad"),
    [
        ("std", 1.2909944487, -0.7745966692),
        ("sample_std", 1.2076147288, -0.7245688373),
        ("none", 0.625, -0.375),
    ],
)
def test_known_advantages(scale, good, bad):
    """The conventions differ by more than the last digits: an epsilon of TRL's, 1e-4, shows too."""
    np.testing.assert_allclose(group_advantages(R, scale), np.where(R, good, bad), atol=1e-9)
    if scale != "none":
        assert abs(group_advantages(R, scale, epsilon=1e-4) - np.where(R, good, bad)).min() > 1e-4
        deviation = 0.625 / good
        np.testing.assert_allclose(
            deviation, {"std": 0.4841229183, "sample_std": 0.5175491695}[scale], atol=1e-9
        )


@pytest.mark.parametrize("scale", ["none", "std", "sample_std"])
def test_equal_rewards_say_nothing(scale):
    """They are compared: mean and deviation of equal numbers are rounding noise."""
    rewards = np.array([[0.1] * 3, [0.7] * 3, [0.1 + 0.2, 0.3, 0.3], [0, 0, 1e-6]])
    assert silent(rewards).tolist() == [True, True, True, False]
    got = group_advantages(rewards, scale)
    assert not got[:3].any() and got[3].any()
    noise = rewards - rewards.mean(-1, keepdims=True)
    deviation = np.sqrt((noise**2).mean(-1, keepdims=True))
    explodes = noise[:3] / np.maximum(deviation[:3], 1e-300)
    assert (np.abs(explodes).max(-1) > 0.9).any()


def test_what_has_no_reward_moves_no_other():
    rewards = np.array([[100.0, 1, 0], [np.nan, 1, 0], [np.nan, 1, 1], [np.nan] * 3])
    got = group_advantages(rewards)
    np.testing.assert_array_equal(got[1:], [[0, 0.5, -0.5], [0, 0, 0], [0, 0, 0]])
    assert abs(got[0, 1] - got[1, 1]) > 30
    np.testing.assert_array_equal(group_advantages(rewards, "std")[1], [0, 1, -1])
    assert silent(rewards).tolist() == [False, False, True, True]


def test_an_unknown_scale():
    with pytest.raises(ValueError, match="scale='deviation' is not one of"):
        group_advantages(R, "deviation")

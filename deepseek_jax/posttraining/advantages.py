"""Advantages of outputs within their group, the samples of one prompt (DeepSeek-V3 report section 5.2.2, equation 27).

On the host, in float64: rewards are few, and a group's mean is exact to rounding.

Dims: p prompt, n sample.
"""

from typing import Any

import numpy as np

from deepseek_jax.checks import choice
from deepseek_jax.posttraining.grpo_config import SCALES

# Rewards that differ by less than this share of the largest are equal: sums of the same parts in another order are.
ROUNDING = 1e-12


def group_advantages(rewards: Any, scale: str = "none", epsilon: float = 0.0) -> np.ndarray:
    """Reward minus the group's mean, over `scale` (`GRPOLossConfig`) plus epsilon: float64 [p, n], of rewards [p, n].

    NaN is an output that has no reward, or no token to learn from: its advantage is 0, and it moves no other's. A group whose
    rewards are equal has zeros: the deviation of equal numbers is rounding noise, over which nothing may be divided.
    Raises ValueError for an unknown scale.
    """
    choice("scale", scale, SCALES)
    rewards = np.asarray(rewards, np.float64)
    counted = ~np.isnan(rewards)
    n = counted.sum(-1, keepdims=True)
    mean = np.where(counted, rewards, 0).sum(-1, keepdims=True) / np.maximum(n, 1)
    advantages = np.where(counted & ~silent(rewards)[..., None], rewards - mean, 0)
    if scale == "none":
        return advantages
    over = np.maximum(n if scale == "std" else n - 1, 1)
    deviation = np.sqrt((advantages**2).sum(-1, keepdims=True) / over) + epsilon
    return advantages / np.where(advantages.any(-1, keepdims=True), deviation, 1)


def silent(rewards: Any) -> np.ndarray:
    """Which groups say nothing, since their rewards are equal or there are none: bool [p], of rewards [p, n]."""
    rewards = np.asarray(rewards, np.float64)
    counted = ~np.isnan(rewards)
    spread = np.where(counted, rewards, -np.inf).max(-1) - np.where(counted, rewards, np.inf).min(-1)
    return ~(spread > ROUNDING * np.where(counted, np.abs(rewards), 0).max(-1))

"""What an answer is worth (report section 5.4.1 and DeepSeek-R1's): rules where there are some, models elsewhere."""

from deepseek_jax.posttraining.rewards.catalogue import RewardConfig, rewards_named
from deepseek_jax.posttraining.rewards.combination import (
    RewardFunction,
    Rewards,
    Scores,
    TimedOut,
    Weighted,
    columns_of,
)

__all__ = [
    "RewardConfig",
    "RewardFunction",
    "Rewards",
    "Scores",
    "TimedOut",
    "Weighted",
    "columns_of",
    "rewards_named",
]

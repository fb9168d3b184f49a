"""How many answers to held-out prompts are right: by the first reward of a run, from 1 on."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.evaluation.passk import pass_at_k
from deepseek_jax.posttraining.experience import Group


class HeldOut(NamedTuple):
    """Answers to held-out prompts. pass_at_1: share of right ones; pass_at_k: of prompts with a right one among k."""

    pass_at_1: float
    pass_at_k: float
    k: int
    reward: float
    answer_tokens: float

    @classmethod
    def of(cls, means: Mapping[str, float], k: int) -> "HeldOut":
        """Of the means of `experience.summary` and `right`; 0 where there is none."""
        once, any_of_k = means.get("pass_at_1", 0.0), means.get("pass_at_k", 0.0)
        return cls(once, any_of_k, k, means["reward"], means["answer_tokens"])

    @property
    def loss(self) -> float:
        """By which `train.keep_best` chooses."""
        return 1.0 - self.pass_at_1


def right(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Sums over groups of k answers, as of `experience.summary`; those to which the first reward does not apply are none."""
    first = [next(iter(group.parts.values())) for group in groups]
    counts = [(len(part), int((part >= 1).sum())) for part in first if not np.isnan(part).any()]
    return {
        name: np.array(
            [sum(pass_at_k(n, c, n if name == "pass_at_k" else 1) for n, c in counts), len(counts)]
        )
        for name in ("pass_at_1", "pass_at_k")
    }

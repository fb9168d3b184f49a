"""`Rewards`: several reward functions with weights, as one score per completion.

A reward function is what TRL calls one:

    f(prompts, completions, completion_ids, **columns) -> list of float or None

Every argument is a list with an entry per completion; a text or a list of messages each, ids, and the columns of the
prompts' rows ("answer", "tests", ...). None says that the reward does not apply to the row. `TimedOut(0.0)` is a
score whose check took too long: it counts as 0, and is counted. What a function raises ends the run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checks import require, shown

_NO_COLUMNS = ("prompt", "prompts", "completion", "completions", "completion_ids")

RewardFunction = Callable[..., Sequence[float | None]]


class TimedOut(float):
    """A score that a check gave because it ran out of time."""


class Weighted(NamedTuple):
    """A reward function with its name and weight."""

    name: str
    weight: float
    function: RewardFunction


class Scores(NamedTuple):
    """What n completions are worth.

    Attributes:
        total: float64 [n], the weighted sum of the rewards that apply.
        parts: name -> float64 [n], unweighted; NaN where the reward does not apply. Of a reward that says that it
            `may_time_out`, also NAME_timed_out -> 1 where its check did, so that it is among what a run shows.
        timeouts: name -> how many of its checks ran out of time.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    timeouts: dict[str, int]


class Rewards:
    """Several rewards, added up by their weights.

    Raises ValueError: no reward, a name twice, or a weight that is no number.
    """

    def __init__(self, rewards: Iterable[Weighted]):
        self.rewards = tuple(rewards)
        names = [reward.name for reward in self.rewards]
        require(bool(names), "there is no reward: name at least one")
        require(len({*names}) == len(names), f"a reward stands twice among {names}")
        for name, weight, _ in self.rewards:
            require(bool(np.isfinite(weight)), f"the weight of reward {name!r} is {shown(weight)}")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> Scores:
        """Scores n completions.

        Args:
            prompts, completions: texts, or lists of messages.
            completion_ids: what was sampled, the end token included.
            columns: the other columns of the prompts' rows, an entry per completion.

        Raises:
            ValueError: lists of unlike lengths, a score that is no finite number, or a row to which no reward applies.
            Whatever a reward raises, with a note of its name.
        """
        given = {"completions": completions, "completion_ids": completion_ids} | columns
        n = len(prompts)
        for name, values in given.items():
            require(len(values) == n, f"{n} prompts have {len(values)} {name}")
        parts, timeouts = {}, {}
        for reward in self.rewards:
            scores = _called(reward, n, {"prompts": prompts} | given)
            parts[reward.name] = np.array([np.nan if s is None else float(s) for s in scores])
            timed_out = np.array([isinstance(score, TimedOut) for score in scores])
            timeouts[reward.name] = int(timed_out.sum())
            if getattr(reward.function, "may_time_out", False):
                parts[f"{reward.name}_timed_out"] = timed_out.astype(np.float64)
        total = self._total(parts, prompts)
        return Scores(total, parts, timeouts)

    def _total(self, parts: Mapping[str, np.ndarray], prompts: Sequence[Any]) -> np.ndarray:
        """float64 [n]: rewards that do not apply add nothing."""
        values = np.stack([parts[reward.name] for reward in self.rewards])
        alone = np.flatnonzero(np.isnan(values).all(axis=0))
        require(
            not alone.size,
            f"none of the rewards {list(parts)} applies to {alone.size} prompts, such as "
            f"{shown(prompts[alone[0]]) if alone.size else ''}: name one that does, or leave these rows out",
        )
        weights = np.array([reward.weight for reward in self.rewards])
        return np.nansum(values * weights[:, None], axis=0)


def _called(reward: Weighted, n: int, given: Mapping[str, Any]) -> Sequence[float | None]:
    """The scores of one reward, checked."""
    try:
        scores = reward.function(**given)
    except BaseException as error:
        error.add_note(f"raised by the reward {reward.name!r}")
        raise
    require(len(scores) == n, f"reward {reward.name!r} gave {len(scores)} scores for {n} completions")
    for score in scores:
        ok = score is None or (isinstance(score, int | float | np.number) and bool(np.isfinite(score)))
        require(ok, f"reward {reward.name!r} gave {shown(score)}: a score is a finite number or None")
    return scores


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows' columns as lists, for `Rewards`; None where a row lacks one. Their own completions are left out."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _NO_COLUMNS)
    return {name: [row.get(name) for row in rows] for name in names}

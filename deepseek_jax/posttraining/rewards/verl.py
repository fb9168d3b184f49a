"""verl's shape of a reward, `compute_score(data_source, solution_str, ground_truth, extra_info)`, in both directions."""

from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.posttraining.rewards import rules
from deepseek_jax.posttraining.rewards.combination import RewardFunction


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
) -> float:
    """The reward "answer", as verl calls it."""
    (score,) = rules.answer(prompts=[""], completions=[solution_str], answer=[ground_truth])
    return 0.0 if score is None else score


def of_verl(score: Callable[..., Any]) -> RewardFunction:
    """A reward function of a `compute_score`; where it returns a dict, of its "score". Rows are verl's."""

    def of_row(text: str, row: Mapping[str, Any]) -> float | None:
        truth = rules.truth_of_row(row)
        if truth is None:
            return None
        found = score(row.get("data_source"), text, truth, row.get("extra_info"))
        return float(found["score"] if isinstance(found, Mapping) else found)

    return rules.by_row(getattr(score, "__name__", "compute_score"), of_row)

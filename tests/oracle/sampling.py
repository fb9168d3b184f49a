"""The distribution that a token is drawn from, by its definition, in float64: one rule after the other."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from deepseek_jax.serving.request import Request


class Case(NamedTuple):
    """A request, the tokens of its answer so far, the ids that a grammar allows (None: all), and how many the tokenizer has."""

    request: Request
    answer: tuple[int, ...] = ()
    allowed: frozenset[int] | None = None
    num_ids: int | None = None


Rule = Callable[[np.ndarray, Case], np.ndarray]  # logits, with -inf for what is out, -> logits


def left_out(x: np.ndarray, out: Sequence[int]) -> np.ndarray:
    left = [i for i in range(len(x)) if x[i] > -np.inf and i not in out]
    return np.array([x[i] if i in left else -np.inf for i in range(len(x))]) if left else x


def bias(x: np.ndarray, case: Case) -> np.ndarray:
    given = dict(case.request.sampling.logit_bias)
    return np.array([x[i] + given.get(i, 0.0) for i in range(len(x))])


def unknown(x: np.ndarray, case: Case) -> np.ndarray:
    return left_out(x, range(len(x) if case.num_ids is None else case.num_ids, len(x)))


def grammar(x: np.ndarray, case: Case) -> np.ndarray:
    return x if case.allowed is None else left_out(x, [i for i in range(len(x)) if i not in case.allowed])


def min_tokens(x: np.ndarray, case: Case) -> np.ndarray:
    return left_out(x, case.request.stop_ids) if len(case.answer) < case.request.min_tokens else x


def repetition(x: np.ndarray, case: Case) -> np.ndarray:
    penalty = case.request.sampling.repetition_penalty
    seen = {*case.request.prompt, *case.answer}
    change = lambda logit: logit / penalty if logit > 0 else logit * penalty  # noqa: E731
    return np.array([change(x[i]) if i in seen else x[i] for i in range(len(x))])


def frequency(x: np.ndarray, case: Case) -> np.ndarray:
    return x - case.request.sampling.frequency_penalty * np.array(
        [case.answer.count(i) for i in range(len(x))]
    )


def presence(x: np.ndarray, case: Case) -> np.ndarray:
    return x - case.request.sampling.presence_penalty * np.array([i in case.answer for i in range(len(x))])


def temperature(x: np.ndarray, case: Case) -> np.ndarray:
    t = case.request.sampling.temperature
    return (x - x.max()) / t if t else left_out(x, [i for i in range(len(x)) if i != int(np.argmax(x))])


def top_k(x: np.ndarray, case: Case) -> np.ndarray:
    """And what ties with the k-th."""
    k = case.request.sampling.top_k or len(x)
    return np.where(x >= sorted(x)[::-1][min(k, len(x)) - 1], x, -np.inf)


def top_p(x: np.ndarray, case: Case) -> np.ndarray:
    """The fewest likeliest that have it; of equally likely ones, those with the lower ids."""
    p, order, kept, mass = probabilities(x), sorted(range(len(x)), key=lambda i: (-x[i], i)), [], 0.0
    if case.request.sampling.top_p == 1:
        return x
    while mass < case.request.sampling.top_p - 1e-7:
        kept.append(order[len(kept)])
        mass += p[kept[-1]]
    return np.array([x[i] if i in kept else -np.inf for i in range(len(x))])


def min_p(x: np.ndarray, case: Case) -> np.ndarray:
    return np.where(np.exp(x - x.max()) >= case.request.sampling.min_p - 1e-7, x, -np.inf)


RULES: tuple[Rule, ...] = (
    *(bias, unknown, grammar, min_tokens),
    *(repetition, frequency, presence),
    *(temperature, top_k, top_p, min_p),
)


def probabilities(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def distribution(logits: np.ndarray, case: Case, rules: Sequence[Rule] = RULES) -> np.ndarray:
    """Probabilities float64 [v]."""
    x = np.asarray(logits, np.float64)
    for rule in rules:
        x = rule(x, case)
    return probabilities(x)


def p_value(counts: np.ndarray, prob: np.ndarray) -> float:
    """Of Pearson's chi-square; ids of fewer than 5 expected draws are taken together."""
    expected = prob * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    rare = (expected < 5) & (expected > 0)
    cells = [(counts[i], expected[i]) for i in np.flatnonzero(~rare & (expected > 0))]
    cells += [(counts[rare].sum(), expected[rare].sum())] if rare.any() else []
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    return float(stats.chi2.sf(statistic, len(cells) - 1)) if len(cells) > 1 else 1.0

"""What several judgements say together: majorities with ties, and rates with their standard errors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from deepseek_jax.checks import require

TIE = 0.5


class Rate(NamedTuple):
    """A mean of n independent values, with its standard error."""

    mean: float
    error: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f} (n={self.n})"


def rate(values: Sequence[float]) -> Rate:
    """Mean and standard error, from the spread of the values themselves (n - 1). Of two judges of the same things, give the
    differences. Raises ValueError for fewer than two values."""
    n = len(values)
    require(n >= 2, f"a standard error needs two values or more, and there are {n}")
    mean = math.fsum(values) / n
    variance = math.fsum((x - mean) ** 2 for x in values) / (n - 1)
    return Rate(mean, math.sqrt(variance / n), n)


def majority(votes: Sequence[bool | None]) -> float | None:
    """1.0 where more votes say yes than no, 0.0 where fewer, 0.5 for a tie. Votes that say nothing (None) do not count; None
    where all are such."""
    said = [vote for vote in votes if vote is not None]
    if not said:
        return None
    yes = 2 * sum(said)
    return TIE if yes == len(said) else float(yes > len(said))


def mean_score(votes: Sequence[float | None]) -> float | None:
    """The mean of the scores that there are; None where there is none."""
    said = [vote for vote in votes if vote is not None]
    return math.fsum(said) / len(said) if said else None


def outcome(difference: float) -> float:
    """Of a comparison: 1.0 where the first has the higher score, 0.0 where the second has, 0.5 for a tie."""
    return TIE if difference == 0 else float(difference > 0)

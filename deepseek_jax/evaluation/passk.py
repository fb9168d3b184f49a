"""pass@k: how likely one of k answers is right, estimated without bias from n >= k answers of which c are right."""

import math
from collections.abc import Iterable


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k). Raises ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(
            f"pass@{k} of {c} right among {n} answers: it needs 0 <= right <= answers and 1 <= k <= answers"
        )
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_pass_at_k(right: Iterable[tuple[int, int]], k: int) -> tuple[float, float]:
    """The mean over questions of (answers, right ones), and its standard error, NaN for a single question."""
    found = [pass_at_k(n, c, k) for n, c in right]
    if not found:
        raise ValueError(f"pass@{k} of no question")
    mean = math.fsum(found) / len(found)
    if len(found) == 1:
        return mean, math.nan
    spread = math.fsum((x - mean) ** 2 for x in found) / (len(found) - 1)
    return mean, math.sqrt(spread / len(found))

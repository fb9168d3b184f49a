"""Several sources with weights, as configs of post-training write them."""

import re
from collections.abc import Sequence

from deepseek_jax.checks import require, shown

_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?")


def weighted(sources: Sequence[str], name: str) -> list[tuple[str, float]]:
    """(source, weight) of each "SOURCE=WEIGHT"; one alone needs no weight. Raises ValueError, with the setting's `name`."""
    found = []
    for entry in sources:
        source, _, weight = entry.rpartition("=")
        number = bool(source) and _NUMBER.fullmatch(weight) is not None
        require(number or len(sources) == 1, f'{name} entry {shown(entry)} should be "SOURCE=WEIGHT"')
        source, share = (source, float(weight)) if number else (entry, 1.0)
        require(
            bool(source) and share > 0, f"{name} entry {shown(entry)} needs a source and a positive weight"
        )
        found.append((source, share))
    return found

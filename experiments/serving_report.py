"""What `experiments.bench serve` prints: figures side by side, ratios, and whether the tokens are the same model's."""

import math
from collections.abc import Sequence

from experiments.serving_load import Figures, median

OURS, TRANSFORMERS = "deepseek_jax", "transformers"
GAP = 2e-4  # logits: each of two within 1e-4 of the exact one

Rounds = dict[str, list[Figures]]  # of each side


def vllm_name(threads: int) -> str:
    return f"vllm, {threads} thread{'s' * (threads > 1)}"


def table(title: str, rounds: Rounds) -> list[str]:
    """Medians of each side, and the ratios of ours to each other one, with those of the single rounds."""
    lines = [
        title,
        f"  {'':<16}{'tokens/s':>9}{'low to high':>17}{'TTFT ms':>14}{'ITL ms':>14}{'goodput/s':>11}{'CPU s per 1,000':>17}",
    ]
    for name, side in rounds.items():
        m, rates = median(side), [f.tokens_per_s for f in side]
        spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
        lines.append(
            f"  {name:<16}{m.tokens_per_s:>9,.0f}{spread:>17}{_pair(m.ttft):>14}{_pair(m.itl):>14}"
            f"{m.goodput:>11.2f}{m.cpu_per_1000:>17.2f}"
        )
    return lines + [ratio(name, rounds[OURS], side) for name, side in rounds.items() if name != OURS]


def _pair(seconds: tuple[float, float]) -> str:
    return "-" if math.isnan(seconds[0]) else "/".join(f"{1e3 * s:,.0f}" for s in seconds)


def ratio(name: str, ours: Sequence[Figures], peer: Sequence[Figures]) -> str:
    single = [o.tokens_per_s / p.tokens_per_s for o, p in zip(ours, peer, strict=True)]
    o, p = median(ours), median(peer)
    goodput = f", goodput {o.goodput / p.goodput:.2f}x" if p.goodput else ""
    return (
        f"  ratio to {name}: {o.tokens_per_s / p.tokens_per_s:.2f}x (rounds {min(single):.2f} to {max(single):.2f}; "
        f"in CPU time {p.cpu_per_1000 / o.cpu_per_1000:.2f}x{goodput})"
    )


def check_gap(name: str, gap: float) -> str:
    if gap > GAP:
        raise ValueError(
            f"{name} chose a token {gap:.3g} below transformers' best logit, more than {GAP}: not the same model"
        )
    return f"the worst of all tokens lies {gap:.1g} below the best logit"

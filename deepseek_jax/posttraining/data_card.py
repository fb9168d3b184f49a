"""The card of a distilled data set: counts, lengths and reasons of rejection, as JSON and as a page."""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.posttraining.selection import KEPT, Answer
from deepseek_jax.posttraining.votes import Rate, rate

Card = dict[str, Any]


def card_of(answers: Sequence[Answer], said: Sequence[str], rows: Mapping[str, Sequence[int]]) -> Card:
    """What was drawn, and what became of it.

    Args:
        said: of each answer `KEPT`, or why it was rejected (`selection.select`).
        rows: kind of sample -> tokens of what is learned of each of its rows.
    """
    problems = sorted({answer.problem for answer in answers})
    right = [answer for answer in answers if answer.right]
    kept = [answer for answer, reason in zip(answers, said, strict=True) if reason == KEPT]
    counts = collections.Counter(reason for reason in said if reason != KEPT)
    card: Card = {
        "problems": len(problems),
        "problems with a right answer": len({answer.problem for answer in right}),
        "problems with a kept answer": len({answer.problem for answer in kept}),
        "answers": len(answers),
        "accuracy": accuracy(answers)._asdict() if len(problems) > 1 else None,
        "kept": len(kept),
        "rejected": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "tokens of answers": {
            name: lengths([answer.tokens for answer in some])
            for name, some in (("all", answers), ("right", right), ("kept", kept))
        },
        "rows": {kind: {"rows": len(tokens), "learned tokens": sum(tokens)} for kind, tokens in rows.items()},
    }
    assert card["answers"] == card["kept"] + sum(counts.values())
    return card


def accuracy(answers: Iterable[Answer]) -> Rate:
    """Mean over problems of the share of right answers; problems, not answers, are independent."""
    of_problem = collections.defaultdict(list)
    for answer in answers:
        of_problem[answer.problem].append(float(answer.right))
    return rate([sum(right) / len(right) for right in of_problem.values()])


def lengths(tokens: Sequence[int]) -> dict[str, float] | None:
    """Mean, median, 90th percentile and longest, in tokens; None of nothing."""
    if not len(tokens):
        return None
    median, most = np.percentile(tokens, (50, 90))
    return {
        "mean": float(np.mean(tokens)),
        "median": float(median),
        "90%": float(most),
        "longest": int(max(tokens)),
    }


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys, but where the data lies; a judge's only where there is one."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}{name}.") if value.get("model", True) else {}
        elif name != "out_dir":
            found[f"{path}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def as_json(card: Card) -> str:
    return json.dumps(card, indent=2, ensure_ascii=False) + "\n"


def as_markdown(card: Card, title: str) -> str:
    """The card as a page: numbers as a list, each table of numbers as a table."""
    plain = [f"- {name}: {_shown(value)}" for name, value in card.items() if not isinstance(value, dict)]
    parts = [f"# {title}", "\n".join(plain)]
    for name, value in card.items():
        if isinstance(value, dict):
            parts.append(f"## {name[:1].upper()}{name[1:]}\n\n{_table(value)}")
    return "\n\n".join(parts) + "\n"


def _table(values: Mapping[str, Any]) -> str:
    rows = {name: value for name, value in values.items() if isinstance(value, dict)}
    if not rows:
        lines = [f"| {name} | {_shown(value)} |" for name, value in values.items()]
        return "\n".join(["| | |", "|---|---|", *lines]) if lines else "none"
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    cells = (" | ".join(_shown(row.get(column)) for column in columns) for row in rows.values())
    return "\n".join(head + [f"| {name} | {row} |" for name, row in zip(rows, cells, strict=True)])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool | str) or value is None:
        text = "-" if value is None else str(value)
    else:
        text = f"{value:,}" if isinstance(value, int) else ", ".join(map(str, value))
    return " ".join(text.replace("|", "\\|").split())

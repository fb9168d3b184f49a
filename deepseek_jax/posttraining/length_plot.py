"""Pictures of accuracy against length: of an expert's answers, and of models that learned from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepseek_jax.posttraining.votes import Rate
from deepseek_jax.training.drawing import BLUE, GREEN, GREY, ORANGE, RED, TITLE

_COLOURS = (BLUE, ORANGE, GREEN, RED)


class Point(NamedTuple):
    """What one model reaches: its accuracy, and the tokens of its answers."""

    name: str
    accuracy: Rate
    length: Rate


def draw_answers(tokens: Sequence[int], right: Sequence[bool], kept: Sequence[int], path: Path) -> None:
    """Of the answers of an expert.

    Left, how many of them end by a length, right and wrong; right, the accuracy if no answer may be longer: what each
    token more is worth. A line stands at the mean length of those that were kept.

    Args:
        tokens, right: of each answer.
        kept: tokens of each that was kept.
        path: of the PNG.
    """
    tokens_n, right_n = np.asarray(tokens), np.asarray(right, bool)
    figure = _figure(12, 4.5)
    counts, trade = figure.subplots(1, 2)
    bins = np.linspace(0, max(1, tokens_n.max()), 41)
    parts = [tokens_n[right_n], tokens_n[~right_n]]
    counts.hist(parts, bins=bins, stacked=True, color=[GREEN, RED], label=["right", "wrong"])
    counts.legend(frameon=False)
    _panel(counts, "Answers", "tokens", "answers")
    limits, accuracy = accuracy_by_length(tokens_n, right_n)
    trade.step([0, *limits], [0, *accuracy], where="post", color=BLUE)
    trade.set_ylim(0, 1)
    if len(kept):
        mean = float(np.mean(kept))
        trade.axvline(mean, color=GREY, linestyle="--")
        trade.text(mean, 0.02, f" kept: {mean:.0f} tokens", color=GREY)
    _panel(trade, "Accuracy, if no answer may be longer", "tokens", "share of right answers")
    _save(figure, path)


def accuracy_by_length(tokens_n: np.ndarray, right_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(limits, accuracy): of all answers the share that is right and no longer than each limit, of all lengths there are."""
    limits = np.unique(tokens_n)
    right_lengths = np.sort(tokens_n[right_n])
    return limits, np.searchsorted(right_lengths, limits, side="right") / len(tokens_n)


def draw_points(points: Sequence[Point], path: Path, title: str = "") -> None:
    """Accuracy against the mean length of answers, with standard errors both ways."""
    figure = _figure(7, 5)
    axes = figure.subplots()
    for i, point in enumerate(points):
        colour = _COLOURS[i % len(_COLOURS)]
        (x, dx, _), (y, dy, _) = point.length, point.accuracy
        axes.errorbar(x, y, dy, dx, "o", color=colour, capsize=3)
        axes.annotate(point.name, (x, y), (6, 6), textcoords="offset points", color=colour)
    axes.set_xlim(left=0)
    axes.margins(x=0.2, y=0.2)
    _panel(axes, title or "Accuracy against length", "tokens of an answer", "accuracy")
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panel(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, **TITLE)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

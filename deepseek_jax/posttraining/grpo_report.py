"""`write_grpo_report` draws a GRPO run on one page: what answers are worth, held-out questions, how far the policy moves, how it
is sampled, and the worst and the best answers to held-out questions."""

import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from deepseek_jax.training import drawing
from deepseek_jax.training.drawing import BLUE, GREEN, GREY, ORANGE, RED, Label, Records, series

# Of a panel: its title, its unit, and for each curve the record's field, its name beside the curve and its colour.
Curves = Sequence[tuple[str, str, str]]
_PANELS: tuple[tuple[str, str, Curves], ...] = (
    ("KL from the reference", "nats per token", (("kl", "KL", BLUE),)),
    ("Entropy", "nats per token", (("entropy", "entropy", BLUE),)),
    (
        "Ratio new / old",
        "",
        (
            ("clip_share", "clipped", RED),
            ("ratio_distance", "|ratio - 1|", BLUE),
            ("dropped_share", "left out", ORANGE),
        ),
    ),
    ("Length of answers", "tokens", (("answer_tokens", "mean", BLUE),)),
    ("Answers", "share", (("cut_off", "cut off", ORANGE), ("silent_groups", "groups all alike", GREY))),
    (
        "Trainer minus sampler",
        "nats, of a token",
        (("sampler_gap", "mean", BLUE), ("sampler_gap_max", "largest", RED)),
    ),
    ("Gradient norm", "", (("grad_norm", "norm", BLUE),)),
    (
        "Seconds per step",
        "",
        (
            ("sampling_seconds", "sampling", BLUE),
            ("scoring_seconds", "scoring", ORANGE),
            ("step_seconds", "all", GREY),
        ),
    ),
)
_LOGARITHMIC = ("Trainer minus sampler", "Gradient norm")
_SHOWN = 3  # answers of each end
_FONT = "DejaVu Sans Mono"  # matplotlib brings it along
_WIDTH, _LINES = 92, 7  # of an answer's text


def write_grpo_report(records: Records, png_path: str | Path, title: str = "") -> None:
    """Draws the records of a run, and the texts of its last record of kind "samples".

    Reads from records of kind "train" the fields of `_PANELS` and "reward", "reward_*"; of kind "eval": pass_at_1, pass_at_k, k.
    What no record has is said to be missing. Raises ValueError: no training record among them.
    """
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    samples = [r for r in records if r["kind"] == "samples"]
    if not train:
        raise ValueError("no record of kind 'train': nothing to draw")
    texts = _texts(samples[-1]) if samples else []
    heights = [3.6, 2.6, 2.6, *([0.32 + 0.155 * _rows(texts)] if texts else [])]
    figure = Figure(
        figsize=(15, sum(heights) + 1.2), dpi=110, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    if title:
        figure.suptitle(title, fontsize=14, fontweight="bold")
    above = grid[0].subgridspec(1, 2)
    _draw_reward(figure.add_subplot(above[0]), train)
    _draw_held_out(figure.add_subplot(above[1]), evals)
    rows = [grid[1].subgridspec(1, 4), grid[2].subgridspec(1, 4)]
    for i, panel in enumerate(_PANELS):
        _draw_curves(figure.add_subplot(rows[i // 4][i % 4]), train, *panel)
    if texts:
        _draw_texts(figure.add_subplot(grid[3]), texts)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path)


# --- panels -----------------------------------------------------------------------------------------------------------


def _draw_reward(axes: Axes, train: Records) -> None:
    parts = sorted({name for r in train for name in r if name.startswith("reward_") and name != "reward_std"})
    colours = (GREEN, ORANGE, RED, GREY)
    curves = [("reward", "reward", BLUE)]
    if len(parts) > 1:
        curves += [(name, name.removeprefix("reward_"), colours[i % 4]) for i, name in enumerate(parts)]
    _draw_curves(axes, train, "Reward of training answers", "mean", curves)
    steps, spread = series(train, "reward_std")
    mean = series(train, "reward")[1]
    if steps.size == len(mean):
        axes.fill_between(steps, mean - spread, mean + spread, color=BLUE, alpha=0.1, linewidth=0)


def _draw_held_out(axes: Axes, evals: Records) -> None:
    steps, ones = series(evals, "pass_at_1")
    if not drawing.panel(axes, "Held-out questions", ones, "right answers"):
        return
    several = series(evals, "pass_at_k")[1]
    axes.plot(steps, ones, "o-", color=GREEN, linewidth=1.8, markersize=5)
    axes.plot(steps, several, "o-", color=BLUE, linewidth=1.4, markersize=4)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    k = evals[-1]["k"]
    labels = [
        Label(ones[-1], f"pass@1 {ones[-1]:.1%}", GREEN),
        Label(several[-1], f"pass@{k} {several[-1]:.1%}", BLUE),
    ]
    drawing.label_beside(axes, labels)


def _draw_curves(axes: Axes, train: Records, title: str, unit: str, curves: Curves) -> None:
    found = [(name, colour, *series(train, field)) for field, name, colour in curves]
    found = [one for one in found if np.isfinite(one[3]).any()]
    every = np.concatenate([values for *_, values in found]) if found else np.array([])
    if not drawing.panel(axes, title, every, unit):
        return
    if title in _LOGARITHMIC and (every[np.isfinite(every)] > 0).all():
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    labels = []
    for name, colour, steps, values in found:
        smooth = drawing.draw_smoothed(axes, steps, values, colour)
        labels.append(Label(smooth[-1], f"{name} {smooth[-1]:.3g}", colour))
    drawing.label_beside(axes, labels)


# --- answers ----------------------------------------------------------------------------------------------------------


def _texts(record: Mapping[str, object]) -> list[list[str]]:
    """The lines of each answer: of the best, then of the worst, in two columns of as many."""
    given = {name: str(text) for name, text in record.items() if name not in ("kind", "step")}
    return [_lines(name, given[name]) for name in sorted(given) if name.startswith(("best", "worst"))]


def _lines(name: str, text: str) -> list[str]:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, _WIDTH) or [""]]
    cut = [*lines[: _LINES - 1], "..."] if len(lines) > _LINES else lines
    return [name.replace("_", " ").upper(), *cut, ""]


def _columns(texts: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    half = -(-len(texts) // 2)
    left, right = ([line for text in part for line in text] for part in (texts[:half], texts[half:]))
    return left, right


def _rows(texts: Sequence[Sequence[str]]) -> int:
    return max(map(len, _columns(texts)))


@functools.cache
def _known() -> frozenset[int]:
    """The characters that the page's font has."""
    return frozenset(get_font(findfont(_FONT)).get_charmap())


def _drawable(line: str) -> str:
    """With a mark in the place of what the font does not have: a model may write anything."""
    return "".join(x if x.isprintable() and ord(x) in _known() else "\N{WHITE SQUARE}" for x in line)


def _draw_texts(axes: Axes, texts: Sequence[Sequence[str]]) -> None:
    axes.set_axis_off()
    axes.set_title("Answers to held-out questions", **drawing.TITLE)
    for x, lines in zip((0.0, 0.5), _columns(texts), strict=True):
        shown = "\n".join(map(_drawable, lines)).replace("$", r"\$")
        place: dict[str, Any] = {"va": "top", "fontsize": 8, "family": _FONT}
        axes.text(x, 1.0, shown, transform=axes.transAxes, **place)

"""Parts of a run's picture: curves as measured and smoothed, labels beside them, an axis of tokens above the steps."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator

Records = Sequence[Mapping[str, Any]]

LINE = 0.19  # inches, of a line of text
BLUE, ORANGE, GREEN, RED, GREY = "#2166ac", "#e08214", "#1b7837", "#b2182b", "0.45"
TITLE: dict[str, Any] = {"fontsize": 11, "fontweight": "bold", "loc": "left"}
_SMOOTH_SHARE = 0.02  # share of a curve over which it is smoothed
_FONT = FontProperties(family="monospace", size=8)
_WIDTH, _LINES = 84, 12  # of a text that the model wrote


def smoothed(values: np.ndarray, decay: float) -> np.ndarray:
    """Exponential moving average over the first axis, its start corrected; NaN counts as not there.

    Args:
        values: [n, ...].
        decay: weight of the past, in [0, 1).
    """
    total, weight = np.zeros(values.shape[1:]), np.zeros(values.shape[1:])
    out = np.empty(values.shape)
    for i, x in enumerate(values):
        there = np.isfinite(x)
        total = np.where(there, decay * total + np.nan_to_num(x), total)
        weight = np.where(there, decay * weight + 1, weight)
        out[i] = total / np.where(weight > 0, weight, np.nan)
    return out


def trend(values: np.ndarray) -> np.ndarray:
    """Smoothed forwards, then backwards: a steep curve does not lag. The last value is that of the forward average."""
    decay = 1 - 1 / max(1.0, _SMOOTH_SHARE * len(values))
    return smoothed(smoothed(values, decay)[::-1], decay)[::-1]


def series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have `name`; null (not finite) becomes NaN, a gap in the line."""
    having = [r for r in records if np.size(r.get(name, ()))]
    steps = np.array([r["step"] for r in having], np.int64)
    return steps, np.array([r[name] for r in having], np.float64)


class Label(NamedTuple):
    """A text beside a curve that ends at height y."""

    y: float
    text: str
    colour: str


def label_beside(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes the labels right of the panel, at the height of their curves' ends, or nearby where they would overlap."""
    bottom, top = axes.get_ylim()
    to_height = np.log if axes.get_yscale() == "log" else np.asarray
    low, high = to_height(bottom), to_height(top)
    shown = sorted((label for label in labels if np.isfinite(label.y)), key=lambda label: label.y)
    heights = [float(np.clip((to_height(label.y) - low) / (high - low), 0, 1)) for label in shown]
    ends = list(heights)
    line = LINE / (axes.bbox.height / axes.figure.dpi)
    half = [0.5 * line * (label.text.count("\n") + 1) for label in shown]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + half[i - 1] + half[i])
    for i in reversed(range(len(heights))):
        above = heights[i + 1] - half[i + 1] if i + 1 < len(heights) else 1 + half[i]
        heights[i] = min(heights[i], above - half[i])
    for label, at, height in zip(shown, ends, heights, strict=True):
        place: dict[str, Any] = {"color": label.colour, "transform": axes.transAxes}
        axes.text(1.015, height, label.text, va="center", fontweight="bold", **place)
        if abs(at - height) > 0.5 * line:  # a leader; otherwise it would look like a minus sign
            axes.plot([1.0, 1.011], [at, height], linewidth=0.8, clip_on=False, **place)


def panel(axes: Axes, title: str, values: np.ndarray | None = None, ylabel: str = "") -> bool:
    """Prepares a panel over steps. If no number of `values` is finite, the panel says so, and the result is False."""
    axes.set_title(title, **TITLE)
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    there = values is None or bool(np.isfinite(values).any())
    if not there:
        not_recorded(axes)
    return there


def not_recorded(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not recorded", color=GREY, ha="center", va="center", transform=axes.transAxes)


def draw_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> np.ndarray:
    """Draws the curve as measured, pale, and smoothed; returns the smoothed values."""
    smooth = trend(values)
    axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
    axes.plot(steps, smooth, color=colour, linewidth=1.8, marker="." if len(steps) == 1 else None)
    return smooth


def number(x: float, _position: int = 0) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(x) >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"


def tokens_above(axes: Axes, train: Records) -> None:
    """A second axis: tokens instead of steps, which the ramp of the batch makes unequal."""
    steps, tokens = series(train, "tokens")
    if steps.size < 2:
        return
    axes.set_xlim(0, steps[-1] * 1.005)
    # Lines beyond both ends, so that the axis goes on: a token per step before the first, the last slope after the last.
    slope = (tokens[-1] - tokens[-2]) / (steps[-1] - steps[-2])
    far = float(steps[-1])
    steps = np.array([-far, 0, *steps, steps[-1] + far])
    tokens = np.array([-far, 0, *tokens, tokens[-1] + slope * far])
    functions = (lambda x: np.interp(x, steps, tokens), lambda y: np.interp(y, tokens, steps))
    second = axes.secondary_xaxis("top", functions=functions)
    second.xaxis.set_major_formatter(FuncFormatter(number))
    second.set_xlabel("tokens")


# --- texts ------------------------------------------------------------------------------------------------------------


def columns(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The lines of a record's texts under their titles, in two columns; both empty where it has none."""
    texts = [_lines(name, text) for name, text in record.items() if isinstance(text, str) and name != "kind"]
    half = -(-len(texts) // 2)
    left, right = ([line for text in part for line in text] for part in (texts[:half], texts[half:]))
    rows = max(len(left), len(right))
    return left + [""] * (rows - len(left)), right


def _lines(name: str, text: str) -> list[str]:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, _WIDTH) or [""]]
    cut = [*lines[: _LINES - 1], "..."] if len(lines) > _LINES else lines
    return [name.replace("_", " ").upper(), *cut, ""]


def draw_texts(axes: Axes, both: tuple[Sequence[str], Sequence[str]]) -> None:
    """Writes two columns of lines; a character that the font has not becomes a box."""
    axes.set_axis_off()
    axes.set_title("What the model writes, from >> on", **TITLE)
    known = get_font(findfont(_FONT)).get_charmap()
    for x, lines in zip((0.0, 0.5), both, strict=True):
        text = "\n".join(lines).replace("\uff5c", "|")  # of special tokens
        shown = "".join(c if ord(c) in known or c == "\n" else "\u25a1" for c in text)
        place: dict[str, Any] = {"va": "top", "fontproperties": _FONT, "transform": axes.transAxes}
        axes.text(x, 1.0, shown, parse_math=False, **place)

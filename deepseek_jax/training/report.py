"""The picture of a run: loss, schedule, gradient, speed, expert load [layer, expert], balance. From its records.

Curves are shown as measured, pale, and smoothed; what they are stands beside them. Uses matplotlib's Figure with the
Agg canvas directly: no pyplot, no global state, no display.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Records = Sequence[Mapping[str, Any]]

_LOAD_SHARE = 0.1  # the heat map shows the mean over this last share of the training records
_SMOOTH_SHARE = 0.02  # of a curve, the span over which it is smoothed
_LINE = 0.19  # inches, of a line of text
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#2166ac", "#e08214", "#1b7837", "#b2182b", "0.45"


def write_report(
    records: Records,
    png_path: str | Path,
    unigram_loss: float | None = None,
    title: str = "",
    warnings: Sequence[str] = (),
    layers: Sequence[str] = (),
) -> None:
    """Draws the records of a run.

    Reads from records of kind "train": loss, mtp_loss, tokens, lr, batch_size, grad_norm, tokens_per_s, mfu,
    step_seconds, data_seconds, max_vio [L], expert_counts [L, E]; of kind "eval": loss, bits_per_byte. What no record
    has is left out of the picture, or said to be missing in it.

    Args:
        records: as `metrics.read_records` gives them.
        png_path: written; its directory is created.
        unigram_loss: nats per token of a unigram model on the validation tokens, drawn as a line.
        warnings: sentences that stand above the picture (`advice.py`).
        layers: names of the L layers; default: their numbers.

    Raises:
        ValueError: no training record among them.
    """
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    if not train:
        raise ValueError("no record of kind 'train': nothing to draw")
    lines = [line for text in warnings for line in _wrapped(text)]
    above = (_LINE + 0.03) * len(lines) + 0.3 * bool(lines)
    figure = Figure(figsize=(13, 11.5 + above), dpi=110, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    FigureCanvasAgg(figure)
    heights = [*([above] if lines else []), 4.6, 2.9, 4.0]
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    if title:
        figure.suptitle(title, fontsize=14, fontweight="bold")
    if lines:
        _draw_warnings(figure.add_subplot(grid[0]), lines)
    _draw_loss(figure.add_subplot(grid[-3]), train, evals, unigram_loss)
    _draw_steps(figure, grid[-2].subgridspec(1, 3), train)
    _draw_experts(figure, grid[-1].subgridspec(1, 2), train, layers)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path)


def _draw_steps(figure: Figure, grid: GridSpecBase, train: Records) -> None:
    _draw_schedule(figure.add_subplot(grid[0]), train)
    _draw_gradient(figure.add_subplot(grid[1]), train)
    _draw_speed(figure.add_subplot(grid[2]), train)


def _draw_experts(figure: Figure, grid: GridSpecBase, train: Records, layers: Sequence[str]) -> None:
    number = max((np.shape(r["max_vio"])[0] for r in train if "max_vio" in r), default=0)
    names = layers if len(layers) == number else [str(layer) for layer in range(number)]
    _draw_load(figure, figure.add_subplot(grid[0]), train, names)
    _draw_balance(figure.add_subplot(grid[1]), train, names)


# --- curves -------------------------------------------------------------------------------------------------


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


def _smooth(values: np.ndarray) -> np.ndarray:
    span = max(1.0, _SMOOTH_SHARE * len(values))
    return smoothed(values, 1 - 1 / span)


def _series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have `name`; null (not finite) becomes NaN, a gap in the line."""
    having = [r for r in records if np.size(r.get(name, ()))]
    steps = np.array([r["step"] for r in having], np.int64)
    return steps, np.array([r[name] for r in having], np.float64)


class _Label(NamedTuple):
    """What stands beside a curve that ends at height y."""

    y: float
    text: str
    colour: str


def _label_beside(axes: Axes, labels: Sequence[_Label]) -> None:
    """Writes the labels right of the panel, at the height of their curves' ends, or nearby where they would overlap."""
    bottom, top = axes.get_ylim()
    to_height = np.log if axes.get_yscale() == "log" else np.asarray
    low, high = to_height(bottom), to_height(top)
    shown = sorted((label for label in labels if np.isfinite(label.y)), key=lambda label: label.y)
    heights = [float(np.clip((to_height(label.y) - low) / (high - low), 0, 1)) for label in shown]
    line = _LINE / (axes.bbox.height / axes.figure.dpi)
    half = [0.5 * line * (label.text.count("\n") + 1) for label in shown]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + half[i - 1] + half[i])
    for i in reversed(range(len(heights))):
        above = heights[i + 1] - half[i + 1] if i + 1 < len(heights) else 1 + half[i]
        heights[i] = min(heights[i], above - half[i])
    for label, height in zip(shown, heights, strict=True):
        axes.text(
            1.012,
            height,
            label.text,
            color=label.colour,
            va="center",
            transform=axes.transAxes,
            fontweight="bold",
        )


def _panel(axes: Axes, title: str, **labels: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _not_recorded(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not recorded", color=_GREY, ha="center", va="center", transform=axes.transAxes)


def _draw_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> np.ndarray:
    """The curve as measured, pale, and smoothed; gives the latter."""
    smooth = _smooth(values)
    axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
    axes.plot(steps, smooth, color=colour, linewidth=1.8, marker="." if len(steps) == 1 else None)
    return smooth


def _number(x: float, _position: int = 0) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(x) >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"


# --- panels -------------------------------------------------------------------------------------------------


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(f"! {text}", 165, subsequent_indent="   ")


def _draw_warnings(axes: Axes, lines: Sequence[str]) -> None:
    axes.set_axis_off()
    box = {"facecolor": "#fff3cd", "edgecolor": "#e0b84c", "boxstyle": "round,pad=0.6"}
    axes.text(0.005, 0.5, "\n".join(lines), va="center", color="#5c4400", transform=axes.transAxes, bbox=box)


def _draw_loss(axes: Axes, train: Records, evals: Records, unigram_loss: float | None) -> None:
    _panel(axes, "Loss", xlabel="step", ylabel="nats per token")
    labels, shown = [], []
    for name, text, colour in (("loss", "training", _BLUE), ("mtp_loss", "training, MTP", _ORANGE)):
        steps, values = _series(train, name)
        if steps.size:
            smooth = _draw_smoothed(axes, steps, values, colour)
            labels.append(_Label(smooth[-1], f"{text} {smooth[-1]:.3f}", colour))
            shown += [np.nanpercentile(values, 99.5), np.nanmin(values)] if np.isfinite(values).any() else []
    steps, values = _series(evals, "loss")
    if steps.size:
        axes.plot(steps, values, "o-", color=_GREEN, linewidth=1.5, markersize=5)
        bits = evals[-1].get("bits_per_byte")
        more = f"\n{bits:.3f} bits per byte" if bits is not None else ""
        labels.append(_Label(values[-1], f"validation {values[-1]:.3f}{more}", _GREEN))
        shown += [np.nanmax(values), np.nanmin(values)]
    if unigram_loss is not None:
        axes.axhline(unigram_loss, color=_GREY, linestyle="--", linewidth=1.2)
        labels.append(_Label(unigram_loss, f"unigram model {unigram_loss:.3f}", _GREY))
        shown.append(unigram_loss)
    if shown:
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.04 * (high - low) - 1e-6, high + 0.04 * (high - low) + 1e-6)
    _tokens_above(axes, train)
    _label_beside(axes, labels)


def _tokens_above(axes: Axes, train: Records) -> None:
    """A second axis: tokens instead of steps, which the ramp of the batch makes unequal."""
    steps, tokens = _series(train, "tokens")
    if steps.size < 2:
        return
    steps, tokens = np.concatenate([[0], steps]), np.concatenate([[0], tokens])
    last = (tokens[-1] - tokens[-2]) / (steps[-1] - steps[-2])  # per step, beyond the last one

    def forward(x):
        return (
            np.interp(x, steps, tokens) + np.maximum(np.asarray(x) - steps[-1], 0) * last + np.minimum(x, 0)
        )

    def backward(y):
        return (
            np.interp(y, tokens, steps) + np.maximum(np.asarray(y) - tokens[-1], 0) / last + np.minimum(y, 0)
        )

    axes.set_xlim(0, steps[-1] * 1.005)
    second = axes.secondary_xaxis("top", functions=(forward, backward))
    second.xaxis.set_major_formatter(FuncFormatter(_number))
    second.set_xlabel("tokens")


def _draw_schedule(axes: Axes, train: Records) -> None:
    _panel(axes, "Learning rate", xlabel="step")
    steps, values = _series(train, "lr")
    if not steps.size:
        return _not_recorded(axes)
    axes.plot(steps, values, color=_BLUE, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}"))
    steps, sizes = _series(train, "batch_size")
    if steps.size and sizes.min() < sizes.max():
        axes.set_title("Learning rate, batch size", fontsize=11, fontweight="bold", loc="left")
        second = axes.twinx()
        second.step(steps, sizes, color=_ORANGE, linewidth=1.2, where="post")
        second.set_ylim(bottom=0)
        second.spines[["top"]].set_visible(False)
        second.set_ylabel("sequences per step", color=_ORANGE)
        second.tick_params(axis="y", colors=_ORANGE)
    return None


def _draw_gradient(axes: Axes, train: Records) -> None:
    _panel(axes, "Gradient norm", xlabel="step")
    steps, values = _series(train, "grad_norm")
    if not np.isfinite(values).any():
        return _not_recorded(axes)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    smooth = _draw_smoothed(axes, steps, values, _BLUE)
    _label_beside(axes, [_Label(smooth[-1], f"{smooth[-1]:.2g}", _BLUE)])
    return None


def _draw_speed(axes: Axes, train: Records) -> None:
    _panel(axes, "Tokens per second", xlabel="step")
    steps, values = _series(train, "tokens_per_s")
    if not steps.size:
        return _not_recorded(axes)
    axes.plot(steps, values, color=_BLUE, linewidth=1.4, marker="." if len(steps) == 1 else None)
    axes.set_ylim(0, 1.15 * float(np.max(values)))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    notes = [f"MFU {np.median(_series(train, 'mfu')[1]):.1%}"] if _series(train, "mfu")[0].size else []
    step_seconds = _series(train, "step_seconds")[1].sum()
    if step_seconds:
        waiting = sum(r["data_seconds"] for r in train if "step_seconds" in r) / step_seconds
        notes.append(f"{waiting:.1%} of the time: waiting for data")
    if notes:
        axes.text(0.03, 0.06, "\n".join(notes), color=_GREY, transform=axes.transAxes)
    _label_beside(axes, [_Label(values[-1], _number(values[-1]), _BLUE)])
    return None


def _draw_load(figure: Figure, axes: Axes, train: Records, names: Sequence[str]) -> None:
    having = [r for r in train if np.size(r.get("expert_counts", []))]
    last = having[-max(1, round(_LOAD_SHARE * len(having))) :]
    steps = f", mean over steps {last[0]['step']} to {last[-1]['step']}" if last else ""
    axes.set_title(f"Expert load{steps}", fontsize=11, fontweight="bold", loc="left")
    axes.set(xlabel="routed expert", ylabel="MoE layer")
    if not last:
        return _not_recorded(axes)
    counts_le = np.mean([np.array(r["expert_counts"], np.float64) for r in last], axis=0)
    load_le = counts_le / np.maximum(counts_le.mean(-1, keepdims=True), np.finfo(np.float64).tiny)
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, float(load_le.max())))
    image = axes.imshow(load_le, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=norm)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda y, _: names[int(y)] if 0 <= y < len(names) else "")
    layers, experts = np.nonzero(load_le == 0)
    axes.scatter(experts, layers, marker="x", color="black", s=24, linewidths=1.0)
    idle = ", × none" if (load_le == 0).any() else ""
    figure.colorbar(image, ax=axes, label=f"tokens / mean tokens of the layer{idle}")
    return None


def _draw_balance(axes: Axes, train: Records, names: Sequence[str]) -> None:
    _panel(axes, "Load balance, each layer", xlabel="step", ylabel="MaxVio (max load / mean load - 1)")
    steps, max_vio_nl = _series(train, "max_vio")
    if not steps.size:
        return _not_recorded(axes)
    smooth_nl = _smooth(max_vio_nl)
    mean_n, worst = smooth_nl.mean(-1), int(np.argmax(smooth_nl[-1]))
    axes.plot(steps, smooth_nl, color=_BLUE, alpha=0.35, linewidth=0.9)
    axes.plot(steps, smooth_nl[:, worst], color=_RED, linewidth=1.3)
    axes.plot(steps, mean_n, color=_BLUE, linewidth=2.2, marker="." if len(steps) == 1 else None)
    axes.set_ylim(bottom=0)
    labels = [_Label(mean_n[-1], f"mean {mean_n[-1]:.2f}", _BLUE)]
    if smooth_nl.shape[1] > 1:
        labels.append(_Label(smooth_nl[-1, worst], f"layer {names[worst]} {smooth_nl[-1, worst]:.2f}", _RED))
    _label_beside(axes, labels)
    return None

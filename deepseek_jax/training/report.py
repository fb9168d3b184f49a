"""`write_report` draws a run's records: loss, schedule, gradient, speed, expert load [layer, expert], balance, and texts
that the model wrote.

Curves are drawn as measured, pale, and smoothed, with their names beside them. It uses matplotlib's Figure with the
Agg canvas directly: no pyplot, no global state, no display.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from deepseek_jax.training import drawing
from deepseek_jax.training.drawing import BLUE, GREEN, GREY, LINE, ORANGE, RED, Label, Records, series

_LOAD_SHARE = 0.1  # the heat map shows the mean over this last share of the training records


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
    step_seconds, data_seconds, max_vio [L], expert_counts [L, E]; of kind "eval": loss, bits_per_byte; of the last one of
    kind "samples", its texts. What no record has is left out of the picture, or said to be missing in it.

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
    texts = drawing.columns(next((r for r in reversed(records) if r["kind"] == "samples"), {}))
    below = 0.5 + 0.155 * len(texts[0]) if texts[0] else 0.0
    lines = [line for text in warnings for line in textwrap.wrap(f"! {text}", 165, subsequent_indent="   ")]
    above = (LINE + 0.03) * len(lines) + 0.3 * bool(lines)
    size = (13, 11.5 + above + below)
    figure = Figure(figsize=size, dpi=110, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    FigureCanvasAgg(figure)
    heights = [height for height in (above, 4.6, 2.9, 4.0, below) if height]
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    if title:
        figure.suptitle(title, fontsize=14, fontweight="bold")
    if lines:
        _draw_warnings(figure.add_subplot(grid[0]), lines)
    if below:
        drawing.draw_texts(figure.add_subplot(grid[-1]), texts)
    first = bool(lines)
    _draw_loss(figure.add_subplot(grid[first]), train, evals, unigram_loss)
    of_steps, of_experts = grid[first + 1].subgridspec(1, 3), grid[first + 2].subgridspec(1, 2)
    for i, draw in enumerate((_draw_schedule, _draw_gradient, _draw_speed)):
        draw(figure.add_subplot(of_steps[i]), train)
    number = max((np.shape(r["max_vio"])[0] for r in train if "max_vio" in r), default=0)
    names = layers if len(layers) == number else [str(layer) for layer in range(number)]
    for i, draw_layers in enumerate((_draw_load, _draw_balance)):
        draw_layers(figure.add_subplot(of_experts[i]), train, names)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path)


# --- panels -------------------------------------------------------------------------------------------------


def _draw_warnings(axes: Axes, lines: Sequence[str]) -> None:
    axes.set_axis_off()
    box = {"facecolor": "#fff3cd", "edgecolor": "#e0b84c", "boxstyle": "round,pad=0.6"}
    axes.text(0.005, 0.5, "\n".join(lines), va="center", color="#5c4400", transform=axes.transAxes, bbox=box)


def _draw_loss(axes: Axes, train: Records, evals: Records, unigram_loss: float | None) -> None:
    drawing.panel(axes, "Loss", ylabel="nats per token")
    labels, shown = [], []
    for name, text, colour in (("loss", "training", BLUE), ("mtp_loss", "training, MTP", ORANGE)):
        steps, values = series(train, name)
        if steps.size:
            smooth = drawing.draw_smoothed(axes, steps, values, colour)
            labels.append(Label(smooth[-1], f"{text} {smooth[-1]:.3f}", colour))
            shown += [np.nanpercentile(values, 99.5), np.nanmin(values)] if np.isfinite(values).any() else []
    steps, values = series(evals, "loss")
    if steps.size:
        axes.plot(steps, values, "o-", color=GREEN, linewidth=1.5, markersize=5)
        bits = evals[-1].get("bits_per_byte")
        more = f"\n{bits:.3f} bits per byte" if bits is not None else ""
        labels.append(Label(values[-1], f"validation {values[-1]:.3f}{more}", GREEN))
        shown += [np.nanmax(values), np.nanmin(values)]
    if unigram_loss is not None:
        axes.axhline(unigram_loss, color=GREY, linestyle="--", linewidth=1.2)
        labels.append(Label(unigram_loss, f"unigram model {unigram_loss:.3f}", GREY))
        shown.append(unigram_loss)
    if shown:
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.04 * (high - low) - 1e-6, high + 0.04 * (high - low) + 1e-6)
    drawing.tokens_above(axes, train)
    drawing.label_beside(axes, labels)


def _draw_schedule(axes: Axes, train: Records) -> None:
    steps, values = series(train, "lr")
    if not drawing.panel(axes, "Learning rate", values):
        return
    axes.plot(steps, values, color=BLUE, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}"))
    steps, sizes = series(train, "batch_size")
    if steps.size and sizes.min() < sizes.max():
        axes.set_title("Learning rate, batch size", **drawing.TITLE)
        second = axes.twinx()
        second.step(steps, sizes, color=ORANGE, linewidth=1.2, where="post")
        second.set_ylim(bottom=0)
        second.spines[["top"]].set_visible(False)
        second.set_ylabel("sequences per step", color=ORANGE)
        second.tick_params(axis="y", colors=ORANGE)


def _draw_gradient(axes: Axes, train: Records) -> None:
    steps, values = series(train, "grad_norm")
    if not drawing.panel(axes, "Gradient norm", values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    smooth = drawing.draw_smoothed(axes, steps, values, BLUE)
    drawing.label_beside(axes, [Label(smooth[-1], f"{smooth[-1]:.2g}", BLUE)])


def _draw_speed(axes: Axes, train: Records) -> None:
    steps, values = series(train, "tokens_per_s")
    if not drawing.panel(axes, "Tokens per second", values):
        return
    axes.plot(steps, values, color=BLUE, linewidth=1.4, marker="." if len(steps) == 1 else None)
    axes.set_ylim(0, 1.15 * float(np.max(values)))
    axes.yaxis.set_major_formatter(FuncFormatter(drawing.number))
    notes = [f"MFU {np.median(series(train, 'mfu')[1]):.1%}"] if series(train, "mfu")[0].size else []
    step_seconds = series(train, "step_seconds")[1].sum()
    if step_seconds:
        waiting = sum(r["data_seconds"] for r in train if "step_seconds" in r) / step_seconds
        notes.append(f"{waiting:.1%} waiting for data")
    if notes:
        axes.set_title(", ".join(notes), fontsize=9, color=GREY, loc="right")
    drawing.label_beside(axes, [Label(values[-1], drawing.number(values[-1]), BLUE)])


def _draw_load(axes: Axes, train: Records, names: Sequence[str]) -> None:
    having = [r for r in train if np.size(r.get("expert_counts", []))]
    last = having[-max(1, round(_LOAD_SHARE * len(having))) :]
    steps = f", mean over steps {last[0]['step']} to {last[-1]['step']}" if last else ""
    axes.set_title(f"Expert load{steps}", **drawing.TITLE)
    axes.set(xlabel="routed expert", ylabel="MoE layer")
    if not last:
        drawing.not_recorded(axes)
        return
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
    axes.figure.colorbar(image, ax=axes, label=f"tokens / mean tokens of the layer{idle}")


def _draw_balance(axes: Axes, train: Records, names: Sequence[str]) -> None:
    steps, max_vio_nl = series(train, "max_vio")
    if not drawing.panel(axes, "Load balance, each layer", max_vio_nl, "MaxVio (max load / mean load - 1)"):
        return
    smooth_nl = drawing.trend(max_vio_nl)
    mean_n, worst = smooth_nl.mean(-1), int(np.argmax(smooth_nl[-1]))
    axes.plot(steps, smooth_nl, color=BLUE, alpha=0.35, linewidth=0.9)
    axes.plot(steps, smooth_nl[:, worst], color=RED, linewidth=1.3)
    axes.plot(steps, mean_n, color=BLUE, linewidth=2.2, marker="." if len(steps) == 1 else None)
    axes.set_ylim(bottom=0)
    labels = [Label(mean_n[-1], f"mean {mean_n[-1]:.2f}", BLUE)]
    if smooth_nl.shape[1] > 1:
        labels.append(Label(smooth_nl[-1, worst], f"layer {names[worst]} {smooth_nl[-1, worst]:.2f}", RED))
    drawing.label_beside(axes, labels)

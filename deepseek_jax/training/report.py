"""The picture of a run: loss curves, expert load [layer, expert], balance over time. From the metrics file.

Uses matplotlib's Figure with the Agg canvas directly: no pyplot, no global state, no display.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deepseek_jax.training.metrics import read_records

Records = Sequence[dict[str, Any]]

_LOAD_SHARE = 0.1  # the heat map shows the mean over this last share of the training records


def write_report(
    metrics_path: str | Path, png_path: str | Path, unigram_loss: float | None = None, title: str = ""
) -> None:
    """Draws the metrics of a run.

    Reads from records of kind "train": loss, mtp_loss, max_vio [L], expert_counts [L, E]; of kind "eval": loss.
    What no record has is left out of the picture, or said to be missing in it.

    Args:
        metrics_path: JSON lines of `MetricsWriter`.
        png_path: written; its directory is created.
        unigram_loss: nats per token of a unigram model on the validation tokens, drawn as a line.

    Raises:
        ValueError: no training record in the file.
    """
    records = read_records(metrics_path)
    train = [r for r in records if r["kind"] == "train"]
    if not train:
        raise ValueError(f"{metrics_path} holds no record of kind 'train': nothing to draw")
    figure = Figure(figsize=(12, 8.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.1, 1])
    if title:
        figure.suptitle(title)
    _draw_loss(
        figure.add_subplot(grid[0, :]), train, [r for r in records if r["kind"] == "eval"], unigram_loss
    )
    _draw_load(figure, figure.add_subplot(grid[1, 0]), train)
    _draw_balance(figure.add_subplot(grid[1, 1]), train)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path)


def _series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have `name`; null (not finite) becomes NaN, a gap in the line."""
    having = [r for r in records if name in r]
    steps = np.array([r["step"] for r in having], np.int64)
    return steps, np.array([r[name] for r in having], np.float64)


def _draw_loss(axes: Axes, train: Records, evals: Records, unigram_loss: float | None) -> None:
    for name, label, colour in (("loss", "training", "C0"), ("mtp_loss", "training, MTP", "C1")):
        steps, values = _series(train, name)
        if steps.size:
            axes.plot(steps, values, color=colour, linewidth=1.0, label=label)
    steps, values = _series(evals, "loss")
    if steps.size:
        last = f"validation (last {values[-1]:.3f})"
        axes.plot(steps, values, "o-", color="C2", linewidth=1.5, markersize=4, label=last)
    if unigram_loss is not None:
        axes.axhline(
            unigram_loss, color="0.4", linestyle="--", label=f"unigram model, validation ({unigram_loss:.3f})"
        )
    axes.set(title="Loss", xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")


def _draw_load(figure: Figure, axes: Axes, train: Records) -> None:
    having = [r for r in train if np.size(r.get("expert_counts", []))]
    last = having[-max(1, round(_LOAD_SHARE * len(having))) :]
    steps = f"mean over steps {last[0]['step']} to {last[-1]['step']}" if last else "not recorded"
    axes.set(title=f"Expert load, {steps}", xlabel="routed expert", ylabel="MoE layer (MTP modules last)")
    if not last:
        return
    counts_le = np.mean([np.array(r["expert_counts"], np.float64) for r in last], axis=0)
    load_le = counts_le / np.maximum(counts_le.mean(-1, keepdims=True), np.finfo(np.float64).tiny)
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, float(load_le.max())))
    image = axes.imshow(load_le, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=norm)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="tokens / mean tokens of the layer")


def _draw_balance(axes: Axes, train: Records) -> None:
    steps, max_vio_nl = _series([r for r in train if np.size(r.get("max_vio", []))], "max_vio")
    axes.set(title="Load balance", xlabel="step", ylabel="MaxVio (max load / mean load - 1)")
    axes.grid(alpha=0.3)
    if not steps.size:
        return
    axes.plot(steps, max_vio_nl, color="C0", alpha=0.25, linewidth=0.7)
    axes.plot(steps, max_vio_nl.mean(-1), color="C3", linewidth=1.5, label="mean over layers")
    axes.plot([], [], color="C0", alpha=0.4, linewidth=0.7, label="one layer each")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")

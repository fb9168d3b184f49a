"""Prints the tables and draws the picture of `experiments.fp8_study`."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepseek_jax.config import PRECISIONS
from experiments.study import fp8_measure
from experiments.study.errors import GEMMS, accumulation_errors
from experiments.study.fp8_measure import (
    SMOOTHING,
    Curves,
    Mean,
    Runs,
    SameWeights,
    Table,
    mean,
    noise,
    relative,
)

DEPTHS = (512, 1024, 2048, 4096, 8192, 16384)
COLOURS = dict(zip(PRECISIONS, (f"C{i}" for i in range(6)), strict=True))
GOAL = 0.25  # per cent, the report's bound on the relative loss error


# --- tables -------------------------------------------------------------------------------------------------


def _print(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Prints a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    print(f"\n{title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in lines), flush=True)


def print_gemm_errors(table: Table) -> None:
    relative = [
        [preset, *(" / ".join(f"{100 * table[d][preset][g].relative_l2:.2f}" for g in GEMMS) for d in table)]
        for preset in PRECISIONS
    ]
    _print("Relative L2 error of fprop / dgrad / wgrad, per cent", ["", *table], relative)
    fprop = {preset: [table[d][preset]["fprop"] for d in table] for preset in PRECISIONS}
    rows = [
        [preset, *(f"{x.calc_diff:.1e}; {1e6 * x.underflow:.0f}, {1e6 * x.saturated:.0f}" for x in errors)]
        for preset, errors in fprop.items()
    ]
    _print("fprop: calc_diff; elements that underflow, elements at 448, per million", ["", *table], rows)


def print_accumulation(accumulation: dict[str, list[float]]) -> None:
    rows = [[name, *(f"{x:.1e}" for x in values)] for name, values in accumulation.items()]
    _print("Sums of exact products in a tensor core, relative L2 error", ["K", *map(str, DEPTHS)], rows)


def _signed(m: Mean, digits: int = 2) -> str:
    return f"{m.value:+.{digits}f} ± {m.error:.{digits}f}"


def print_training(curves: dict[str, Curves]) -> None:
    """Prints means and standard errors over the seeds; each run is compared with the bf16 run of its own seed."""
    bf16 = curves["bf16"]
    half = bf16.loss.shape[1] // 2
    title = (
        f"Training against bf16 of the same seed, per cent, {len(bf16.loss)} seeds, mean ± standard error: training "
        f"loss smoothed ({SMOOTHING}) at the last step and over the last half, validation loss at the end"
    )
    rows = []
    for preset in PRECISIONS[1:]:
        error = relative(curves[preset].loss, bf16.loss)
        end = relative(curves[preset].validation, bf16.validation)
        rows.append([preset, *map(_signed, (mean(error[:, -1]), mean(error[:, half:].mean(1)), mean(end)))])
    apart = np.abs(noise(curves))
    v = bf16.validation
    apart_v = [abs(relative(v[j], v[i])) for i in range(len(v)) for j in range(i + 1, len(v))]
    floor = (apart[:, -1].mean(), apart[:, half:].mean(), np.mean(apart_v))
    rows.append(["two bf16 seeds, mean distance", *(f"{x:.2f}" for x in floor)])
    _print(title, ["", "last", "last half", "validation"], rows)


def print_same_weights(same: dict[str, SameWeights]) -> None:
    title = "On the trained bf16 weights, per cent: error of the loss; relative L2 error of the gradient"
    rows = [[preset, _signed(s.loss, 4), f"{s.gradient:.1f}"] for preset, s in same.items()]
    _print(title, ["", "loss", "gradient"], rows)


# --- picture ------------------------------------------------------------------------------------------------


def _draw_gemms(wide: Any, narrow: Any, table: Table) -> None:
    width = 0.8 / len(PRECISIONS)
    for ax, what, groups in (
        (wide, "relative_l2", [(d, g) for d in table for g in GEMMS]),
        (narrow, "underflow", [(d, "fprop") for d in table]),
    ):
        for i, preset in enumerate(PRECISIONS):
            values = [getattr(table[d][preset][g], what) for d, g in groups]
            ax.bar(np.arange(len(groups)) + i * width, values, width, label=preset, color=COLOURS[preset])
        labels = [f"{g}\n{d}" if g == "dgrad" else g for d, g in groups]
        if ax is narrow:
            labels = [d.replace(" ", "\n") for d in table]
        ax.set_xticks(np.arange(len(groups)) + 0.4 - width / 2, labels, fontsize=8)
        ax.set_yscale("log")
    wide.set_title("GEMM error, relative L2")
    wide.set_ylim(top=0.3)  # room for the legend
    wide.legend(fontsize=8, ncols=len(PRECISIONS), loc="upper center")
    narrow.set_title("share of activations that become zero")


def _draw_sums(ax: Any, accumulation: dict[str, list[float]]) -> None:
    for name, values in accumulation.items():
        ax.loglog(DEPTHS, values, "--" if "promoted" in name else "-", label=name)
    ax.set_title("error of a sum in a 14-bit accumulator")
    ax.set_xlabel("contraction K")
    ax.legend(fontsize=8)


def _draw_same_weights(ax: Any, same: dict[str, SameWeights]) -> None:
    presets = list(same)
    losses = [(same[p].loss.value, 2 * same[p].loss.error) for p in presets]
    values, spreads = zip(*losses, strict=True)
    ax.bar(presets, values, yerr=spreads, color=[COLOURS[p] for p in presets], capsize=4)
    ax.set_xticks(range(len(presets)), [p.replace("_", "\n", 1) for p in presets], fontsize=8)
    ax.axhline(0, color="0.5", linewidth=0.8)
    ax.set_title("loss on equal weights, % above bf16, ± 2 standard errors", fontsize=10)


def _draw_training(left: Any, right: Any, curves: dict[str, Curves]) -> None:
    for preset, curve in curves.items():
        steps = np.arange(1, curve.loss.shape[1] + 1)
        left.plot(steps, curve.loss.mean(0), label=preset, color=COLOURS[preset])
        if preset == "bf16":
            continue
        error = relative(curve.loss, curves["bf16"].loss)
        middle, spread = error.mean(0), error.std(0, ddof=1) / np.sqrt(len(error))
        right.plot(steps, middle, label=preset, color=COLOURS[preset])
        right.fill_between(steps, middle - spread, middle + spread, color=COLOURS[preset], alpha=0.15)
    for pair in noise(curves):
        right.plot(np.arange(1, len(pair) + 1), pair, ":", color="0.5", linewidth=1)
    right.plot([], [], ":", color="0.5", label="bf16, other seed")
    left.set_title("training loss, nats per token, mean of the seeds")
    left.set_xlabel("step")
    left.legend(fontsize=8)
    right.axhspan(-GOAL, GOAL, color="0.9", zorder=0, label=f"within {GOAL}%")
    settled = relative(np.concatenate([c.loss for c in curves.values()]), curves["bf16"].loss.mean(0))
    bound = max(1.0, 1.5 * np.abs(settled[:, settled.shape[1] // 4 :]).max())
    right.set_ylim(-bound, bound)
    right.set_title("relative to bf16 of the same seed, per cent, mean ± standard error")
    right.set_xlabel("step")
    right.legend(fontsize=8)


def draw(
    table: Table,
    accumulation: dict[str, list[float]],
    curves: dict[str, Curves],
    same: dict[str, SameWeights],
    path: Path,
    title: str,
) -> None:
    figure = Figure(figsize=(15, 11), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(3, 6, height_ratios=[1, 1, 1.2])
    _draw_gemms(figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, :2]), table)
    _draw_sums(figure.add_subplot(grid[1, 2:4]), accumulation)
    _draw_same_weights(figure.add_subplot(grid[1, 4:]), same)
    _draw_training(figure.add_subplot(grid[2, :3]), figure.add_subplot(grid[2, 3:]), curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def write(runs: Runs, out: Path) -> None:
    """Does everything that needs no training: measurements, tables, `fp8_study.png`."""
    trained = fp8_measure.load(runs["bf16"][0])
    table, same = fp8_measure.errors(trained), fp8_measure.same_weights(trained)
    accumulation = accumulation_errors(DEPTHS, np.random.default_rng(0))
    curves = fp8_measure.curves(runs)
    print_gemm_errors(table)
    print_accumulation(accumulation)
    print_training(curves)
    print_same_weights(same)
    cfg = runs["bf16"][0]
    title = f"FP8 study: {cfg.model.num_params():,} parameters, {cfg.train.steps} steps, {len(runs['bf16'])} seeds"
    draw(table, accumulation, curves, same, out / "fp8_study.png", title)
    print(f"\npicture: {out / 'fp8_study.png'}", flush=True)

"""Draws needle grids side by side, each as report figure 8: lengths from left to right, depths downwards."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from deepseek_jax.evaluation.needle import Grid
from deepseek_jax.training import drawing

_COLUMN, _ROW = 0.62, 0.42  # inches of a cell


def draw(grids: Mapping[str, Grid], path: str | Path, notes: Sequence[str] = ()) -> None:
    """Writes a PNG with a panel for each grid, by name, and `notes` below."""
    first = next(iter(grids.values()))
    width = len(grids) * (len(first.lengths) * _COLUMN + 0.7) + 1.2
    height = max(2.2, len(first.depths) * _ROW + 1.4) + drawing.LINE * len(notes)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        image = _panel(axes, name, grid)
    panels[0].set_ylabel("depth of the needle, % of the text")
    bar = figure.colorbar(image, ax=list(panels), shrink=0.9)
    bar.set_label(f"probability of the right answer, mean of {first.samples}")
    if notes:
        figure.supxlabel("\n".join(notes), fontsize=9, x=0.01, ha="left")
    figure.savefig(path)


def _panel(axes: Axes, name: str, grid: Grid) -> AxesImage:
    axes.set_title(f"{name}: {grid.mean:.0%}", **{**drawing.TITLE, "fontsize": 10})
    image = axes.imshow(grid.right.T, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(grid.lengths)), [f"{n:,}" for n in grid.lengths], rotation=45)
    axes.set_yticks(range(len(grid.depths)), map(str, grid.depths))
    axes.set_xlabel("tokens of the prompt")
    for (i, j), share in np.ndenumerate(grid.right):
        axes.text(i, j, f"{share:.0%}", ha="center", va="center", fontsize=7)
    return image

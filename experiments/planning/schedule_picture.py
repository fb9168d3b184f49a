"""Draws pipeline schedules over time: one row per rank, colours as in figure 5 of the report."""

import io
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch

from deepseek_jax.parallel.pipeline.ops import Item
from deepseek_jax.parallel.pipeline.schedules import Schedule
from deepseek_jax.parallel.pipeline.simulate import Event, Timeline

# Of direction 0, with black numbers, and of direction 1, with white ones.
COLOURS = {
    "F": ("#f7b267", "#b85c00"),
    "B": ("#8fcf7f", "#2c7a2c"),
    "Bi": ("#9fe0d8", "#1d7f78"),
    "W": ("#a9c4eb", "#3f66a8"),
}
NAMES = {"F": "forward", "B": "backward", "Bi": "backward for inputs", "W": "backward for weights"}
IDLE = "#f0f0f0"
ROW, NARROW = 0.27, 0.155  # inches: height of a rank, width of the narrowest box
WIDEST = 48.0  # inches
LARGEST, SMALLEST = 7.5, 3.5  # points, of numbers in boxes


class Box(NamedTuple):
    """A forward, backward or weight gradients of a rank: one op, or one half of a pair."""

    rank: int
    start: float
    end: float
    kind: str
    item: Item


Run = tuple[Schedule, Timeline]


def draw(runs: Sequence[Run]) -> bytes:
    """Returns a PNG with a panel per schedule, all on one scale of time.

    Raises:
        ValueError: nothing takes any time.
    """
    longest = max(timeline.makespan for _, timeline in runs)
    if longest == 0:
        raise ValueError("all costs are 0: there is nothing to draw")
    boxes = [[box for event in timeline.events for box in _boxes(event)] for _, timeline in runs]
    narrowest = min(box.end - box.start for panel in boxes for box in panel if box.end > box.start)
    width = min(max(longest / narrowest * NARROW, 9.0), WIDEST)
    heights = [schedule.num_ranks * ROW + 0.75 for schedule, _ in runs]
    figure = Figure(figsize=(width + 1.4, sum(heights) + 0.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(runs), 1, height_ratios=heights)
    for i, (schedule, timeline) in enumerate(runs):
        axes = figure.add_subplot(grid[i])
        axes.set(xlim=(0, longest), ylim=(schedule.num_ranks, 0))
        _label(axes, schedule, timeline)
        _draw_boxes(axes, boxes[i])
        _draw_pairs(axes, timeline)
        _draw_numbers(axes, boxes[i], 72 * width / longest)
    _draw_legend(figure, {box.kind for panel in boxes for box in panel}, runs)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _boxes(event: Event) -> Iterator[Box]:
    """A pair's time is divided between its halves."""
    op = event.op
    parts = (("F", op.forward), ("Bi" if op.split else "B", op.backward), ("W", op.weights))
    there = [(kind, item) for kind, item in parts if item is not None]
    share = (event.end - event.start) / len(there)
    for i, (kind, item) in enumerate(there):
        yield Box(event.rank, event.start + i * share, event.start + (i + 1) * share, kind, item)


def _corners(rank: int, start: float, end: float) -> list[tuple[float, float]]:
    top, bottom = rank + 0.06, rank + 0.94
    return [(start, top), (end, top), (end, bottom), (start, bottom)]


def _draw_boxes(axes: Axes, boxes: Sequence[Box]) -> None:
    colours = [COLOURS[box.kind][box.item.direction] for box in boxes]
    corners = [_corners(*box[:3]) for box in boxes]
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.5))


def _draw_pairs(axes: Axes, timeline: Timeline) -> None:
    pairs = [e for e in timeline.events if e.op.forward is not None and e.op.backward is not None]
    corners = [_corners(e.rank, e.start, e.end) for e in pairs]
    axes.add_collection(PolyCollection(corners, facecolors="none", edgecolors="black", linewidths=0.9))


def _draw_numbers(axes: Axes, boxes: Sequence[Box], scale: float) -> None:
    """Writes the micro-batch into each box that is wide enough. `scale`: points per unit of time."""
    for box in boxes:
        text = str(box.item.micro)
        size = min(LARGEST, scale * (box.end - box.start) / (0.68 * len(text)))
        if size >= SMALLEST:
            place = (box.start + box.end) / 2, box.rank + 0.53
            colour = ("black", "white")[box.item.direction]
            axes.text(*place, text, size=size, color=colour, ha="center", va="center")


def _label(axes: Axes, schedule: Schedule, timeline: Timeline) -> None:
    bubbles = sorted({f"{bubble:.6g}": bubble for bubble in timeline.bubble}.items(), key=lambda x: x[1])
    bubble = bubbles[0][0] if len(bubbles) == 1 else f"{bubbles[0][0]} to {bubbles[-1][0]}"
    axes.set_title(
        f"{schedule.name}: {schedule.num_stages} stages on {schedule.num_ranks} ranks, {schedule.num_micro} "
        f"micro-batches; makespan {timeline.makespan:.6g}, bubble {bubble}, at most {max(timeline.peak)} activations",
        fontsize=9,
        fontweight="bold",
        loc="left",
    )
    axes.axvspan(0, timeline.makespan, color=IDLE, linewidth=0, zorder=0)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    stages = [[schedule.stage(r, d) for d in range(schedule.directions)] for r in range(schedule.num_ranks)]
    names = [f"rank {r} · {', '.join(map(str, sorted(held)))}" for r, held in enumerate(stages)]
    axes.set_yticks([r + 0.5 for r in range(schedule.num_ranks)], names)
    axes.set_ylabel("rank · its stages", fontsize=8)
    axes.set_xlabel("time", fontsize=8)


def _draw_legend(figure: Figure, kinds: Collection[str], runs: Sequence[Run]) -> None:
    two = any(schedule.directions == 2 for schedule, _ in runs)
    entries: dict[str, Any] = {  # label -> handles, which matplotlib takes as a tuple
        NAMES[kind]: tuple(Patch(facecolor=colour) for colour in COLOURS[kind][: 1 + two])
        for kind in COLOURS
        if kind in kinds
    }
    if two:
        entries["overlapped pair"] = (Patch(facecolor="none", edgecolor="black"),)
    entries["idle"] = (Patch(facecolor=IDLE, edgecolor="0.8"),)
    if two:
        entries["dark colours: direction 1"] = (Patch(visible=False),)
    figure.legend(
        entries.values(),
        entries,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.2)},
        loc="outside upper left",
        ncols=len(entries),
        frameon=False,
        fontsize=8,
    )

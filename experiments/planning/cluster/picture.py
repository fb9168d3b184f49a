"""One page of a simulated day: nodes, what users see, balance among devices, and where the time of steps goes."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.planning.cluster.day import Lapse, Window, spread
from experiments.planning.cluster.report import NOT, parts_of

PREFILL, DECODE, GREY = "#e08214", "#3f66a8", "#8a8a8a"
SHADES = ("#c7d7f0", "#7f9fd6", "#3f66a8")
COLOURS = (
    "#3f66a8",
    "#7f9fd6",
    "#a9c4eb",
    "#f7b267",
    "#e08214",
    "#8fcf7f",
    "#2c7a2c",
    "#9fe0d8",
    "#c9a0dc",
    "#d8d8d8",
    "#b0b0b0",
    "#707070",
)


def draw(lapse: Lapse) -> bytes:
    """Returns a PNG."""
    figure = Figure(figsize=(13, 13.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 2)
    _nodes(axes[0, 0], lapse)
    _throughput(axes[0, 1], lapse)
    _percentiles(axes[1, 0], lapse, "wait")
    _percentiles(axes[1, 1], lapse, "speed")
    _balance(axes[2, 0], lapse)
    _parts(axes[2, 1], lapse)
    figure.suptitle(
        f"A simulated day of DeepSeek-V3 on {lapse.setting.hardware.name.upper()}s: real scheduler and router, modelled steps"
    )
    figure.supxlabel("\n".join(NOT), fontsize=8, x=0.01, ha="left")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _hours(axes: Axes, lapse: Lapse, title: str, **more: Any) -> list[int]:
    hours = [w.hour for w in lapse.windows]
    axes.set(title=title, xlabel="hour of the day", xlim=(min(hours) - 0.5, max(hours) + 0.5), **more)
    axes.set_xticks([hour for hour in hours if hour % 3 == 0])
    axes.grid(alpha=0.3)
    return hours


def _nodes(axes: Axes, lapse: Lapse) -> None:
    hours = _hours(axes, lapse, "nodes", ylabel="nodes of 8 GPUs")
    prefill, decode = ([w.nodes[i] for w in lapse.windows] for i in (0, 1))
    axes.bar(hours, decode, color=DECODE, label="decode")
    axes.bar(hours, prefill, bottom=decode, color=PREFILL, label="prefill")
    mean = sum(lapse.nodes())
    axes.axhline(mean, color="black", lw=1, ls="--", label=f"mean {mean:.1f}")
    axes.set_ylim(0, 1.2 * max(sum(w.nodes) for w in lapse.windows))
    axes.legend(loc="upper left", ncols=3)


def _throughput(axes: Axes, lapse: Lapse) -> None:
    hours = _hours(axes, lapse, "tokens per second and node", ylabel="thousands")
    rest = 1 - lapse.hits()
    came = [lapse.uncached(w) / rest / 1e3 for w in lapse.windows]
    axes.plot(hours, came, color=PREFILL, marker=".", label="prefill: input, with what the cache has")
    axes.plot(
        hours,
        [lapse.uncached(w) / 1e3 for w in lapse.windows],
        color=PREFILL,
        ls=":",
        label="prefill: computed",
    )
    axes.plot(
        hours, [lapse.drawn(w) / 1e3 for w in lapse.windows], color=DECODE, marker=".", label="decode: output"
    )
    axes.set_ylim(0, 1.35 * max(came))
    axes.legend(loc="upper right")


def _percentiles(axes: Axes, lapse: Lapse, what: str) -> None:
    titles = {
        "wait": ("time to the first token", "seconds"),
        "speed": ("a user's tokens per second, after the first", "tokens/s"),
    }
    hours = _hours(axes, lapse, titles[what][0], ylabel=titles[what][1])
    values = [spread([getattr(j, what) for j in w.jobs if getattr(j, what) > 0]) for w in lapse.windows]
    slowest = [
        float(np.quantile([j.speed for j in w.jobs if j.speed > 0] or [0], 0.01)) for w in lapse.windows
    ]
    if what == "wait":
        for i, name in ((2, "99%"), (1, "90%"), (0, "median")):
            axes.plot(hours, [v[i] for v in values], color=SHADES[2 - i], marker=".", label=name)
        axes.set_ylim(bottom=0)
    else:
        axes.axhspan(20, 22, color="#e6e6e6", label="published: 20 to 22")
        axes.plot(hours, [v[0] for v in values], color=SHADES[2], marker=".", label="median")
        axes.plot(hours, slowest, color=SHADES[1], marker=".", label="the slowest 1%")
        axes.set_ylim(0, 1.25 * max(v[0] for v in values))
    axes.legend()


def _balance(axes: Axes, lapse: Lapse) -> None:
    """The devices of a unit: the busiest over the mean."""
    hours = _hours(axes, lapse, "balance: a unit's fullest simulated device over the mean", ylabel="ratio")
    for phase, what, colour, style in (
        ("decode", "sequences", DECODE, "-"),
        ("decode", "cached tokens", DECODE, ":"),
        ("prefill", "tokens of a step", PREFILL, "-"),
    ):
        values = [_ratio(w, phase, what == "cached tokens") for w in lapse.windows]
        axes.plot(hours, values, color=colour, ls=style, marker=".", label=f"{phase}, {what}")
    axes.set_ylim(bottom=1)
    axes.legend()


def _ratio(w: Window, phase: str, cached: bool) -> float:
    loads = [np.multiply(s.counts, s.contexts if cached else 1) for s in w.of(phase)]
    full = [x for x in loads if x.sum()]
    return float(np.mean([x.max() / x.mean() for x in full])) if full else 1.0


def _parts(axes: Axes, lapse: Lapse) -> None:
    """Of the mean step of each phase."""
    axes.set(
        title="where the arithmetic and the exchange of a step go (one after the other)",
        xlim=(0, 100),
        xlabel="%",
    )
    names: list[str] = []
    for y, phase in enumerate(("decode", "prefill")):
        left, parts = 0.0, parts_of(lapse, phase)
        total = sum(parts.values())
        for name, seconds in parts.items():
            if name not in names:
                names.append(name)
            share = 100 * seconds / total
            axes.barh(y, share, left=left, color=COLOURS[names.index(name) % len(COLOURS)], edgecolor="white")
            if share > 3.5:
                axes.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=8)
            left += share
    axes.set_yticks([0, 1], ["decode", "prefill"])
    axes.set_ylim(-0.5, 2.6)
    handles = [
        axes.barh([0], [0], color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(names)
    ]
    axes.legend(handles=handles, loc="upper center", ncols=3, fontsize=8)

"""The shortcuts against the whole: a small cluster with every device and every step, beside one with some devices of each unit
and a look at what has come every few steps."""

from typing import NamedTuple

from experiments.planning.cluster.cluster import Cluster, Shape
from experiments.planning.cluster.day import Rates, Window, spread
from experiments.planning.cluster.setting import Setting
from experiments.planning.tables import table


class Seen(NamedTuple):
    """What a simulation says of an hour."""

    speed: float
    rows: float
    step: float
    prefill_step: float
    wait: float
    wait_90: float


NAMES = (
    "tokens/s of a user",
    "sequences on a device",
    "decode step, ms",
    "prefill step, s",
    "TTFT, median, s",
    "TTFT, 90%, s",
)


def seen(setting: Setting, shape: Shape, warm: float, seconds: float, seed: int, hour: int = 14) -> Seen:
    cluster, rates = Cluster(setting, shape, seed), Rates(setting, shape)
    cluster.rate, cluster.share = rates.all(hour), rates.share(hour)
    cluster.start(rates.all(hour), rates.rows(hour))
    cluster.run(warm)
    cluster.jobs.clear()
    cluster.samples.clear()
    cluster.run(warm + seconds)
    w = Window(hour, setting.nodes(hour), tuple(cluster.jobs), tuple(cluster.samples), seconds)
    decode, prefill = w.of("decode"), w.of("prefill")
    steps = sum(s.steps for s in decode)
    waits = spread([j.wait for j in w.jobs])
    return Seen(
        speed=sum(len(j.answer) - 1 for j in w.jobs) / sum(j.end - j.first for j in w.jobs),
        rows=sum(s.took.work.amount * s.steps for s in decode) / steps,
        step=1e3 * sum(s.took.seconds * s.steps for s in decode) / steps,
        prefill_step=sum(s.took.seconds for s in prefill) / len(prefill),
        wait=waits[0],
        wait_90=waits[1],
    )


def report(whole: Seen, short: Seen) -> str:
    rows = [
        (name, [f"{a:.3f}", f"{b:.3f}", f"{b / a - 1:+.1%}"])
        for name, a, b in zip(NAMES, whole, short, strict=True)
    ]
    return table("one unit of each phase", ["every device", "as a day is", "differs"], rows)

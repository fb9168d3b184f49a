"""A unit is lost for some minutes: what users see meanwhile."""

import dataclasses
from collections.abc import Sequence

from experiments.planning.cluster.cluster import Cluster, Shape
from experiments.planning.cluster.day import WARM, Rates, Window, spread
from experiments.planning.cluster.setting import Setting
from experiments.planning.tables import table

HOUR = 14  # of a busy afternoon
BEFORE, AFTER, BIN = 60.0, 240.0, 30.0  # seconds


@dataclasses.dataclass(frozen=True)
class Failure:
    """windows: of BIN seconds each; lost: requests that were sent once more; units: that run, of that phase."""

    phase: str
    minutes: float
    windows: Sequence[Window]
    lost: int
    units: int


def simulate_failure(setting: Setting, shape: Shape, phase: str, minutes: float, seed: int) -> Failure:
    """All units of `phase` are simulated, with two devices each, and one is lost; the router sends its requests to others at
    once, and it comes back empty. Of two devices the slowest of a unit is guessed: of prefill, too low."""
    units = dict(zip(("prefill", "decode"), setting.units(HOUR), strict=True))[phase]
    shape = shape._replace(**{phase: units, f"{phase}_ranks": 2})
    cluster, rates = Cluster(setting, shape, seed), Rates(setting, shape)
    cluster.rate, cluster.share = rates.all(HOUR), rates.share(HOUR)
    cluster.start(rates.all(HOUR), rates.rows(HOUR))
    gone = WARM + BEFORE
    back = gone + 60 * minutes
    cluster.at(gone, cluster.lose, f"{phase}-00")
    cluster.at(back, cluster.bring, f"{phase}-00")
    cluster.run(WARM)
    windows, end = [], WARM
    while end < back + AFTER:
        cluster.jobs.clear()
        cluster.samples.clear()
        end += BIN
        cluster.run(end)
        windows.append(Window(HOUR, setting.nodes(HOUR), tuple(cluster.jobs), tuple(cluster.samples), BIN))
    return Failure(phase, minutes, windows, cluster.lost, units)


def report(failure: Failure) -> str:
    """By the time at which answers ended."""
    rows = []
    for i, w in enumerate(failure.windows):
        decode = w.of("decode")
        steps = sum(s.steps for s in decode)
        waits, speeds = spread([j.wait for j in w.jobs]), sorted(j.speed for j in w.jobs if j.speed > 0)
        rows.append(
            (
                f"{i * BIN - BEFORE:+.0f} s",
                [
                    *(f"{x:.2f}" for x in waits),
                    f"{speeds[len(speeds) // 2]:.1f}",
                    f"{speeds[len(speeds) // 100]:.1f}",
                    f"{sum(s.took.work.amount * s.steps for s in decode) / steps:.1f}",
                    f"{1e3 * sum(s.took.seconds * s.steps for s in decode) / steps:.1f}",
                ],
            )
        )
    columns = ["TTFT 50%", "90%", "99%", "tokens/s 50%", "slowest 1%", "sequences", "step, ms"]
    title = f"one of {failure.units} {failure.phase} units lost for {failure.minutes:g} minutes"
    return (
        table(title, columns, rows)
        + f"\n  {failure.lost} requests of the simulated devices were sent once more, from their beginning. Times are seconds after"
        " the loss, at which answers ended."
    )

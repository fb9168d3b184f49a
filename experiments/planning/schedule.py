"""`python -m experiments.plan schedule` simulates pipeline schedules, compares them with the formulas of the report's table
2, and draws them.

    python -m experiments.plan schedule --stages 8 --micro 20 --out dualpipe.png
    python -m experiments.plan schedule --schedule one_f_one_b zero_bubble dualpipe --stages 16 --micro 120
    python -m experiments.plan schedule --stages 4 --micro 8 --costs F=1,1,1,1.3 B=2,2,2,2.6 W=1 hop=0.1 --queue 1

Costs are in any unit of time: F, B (with weight gradients), W, Bi (without; B - W where it is not given), F&B (F + B where
it is not given; quote it from the shell), hop (a message). Several values with commas are those of the stages.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from deepseek_jax.data.text_files import write_file
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES, Schedule
from deepseek_jax.parallel.pipeline.simulate import Costs, Timeline, simulate, synchronous
from experiments import command_line

COSTS = {"F": 1.0, "B": 2.0, "W": 1.0}
HEAD = (
    "",
    "ranks",
    "makespan",
    "bubble, least",
    "most",
    "formula",
    "activations",
    "formula",
    "queue",
    "in ticks",
)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="plan schedule", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--schedule", nargs="+", choices=SCHEDULES, default=["dualpipe"], help="one or several"
    )
    parser.add_argument("--stages", type=int, default=8, help="DualPipeV has two per rank [8]")
    parser.add_argument("--micro", type=int, default=20, help="micro-batches [20]")
    parser.add_argument(
        "--queue", type=int, help="weight gradients that may wait [as many as the schedule has]"
    )
    parser.add_argument(
        "--costs", nargs="+", type=_cost, default=[], metavar="OP=COST", help="[F=1 B=2 W=1 F&B=3]"
    )
    parser.add_argument("--out", type=Path, help="a PNG file: one row per rank")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix != ".png":
        parser.error(f"--out={args.out} must end in .png")
    return args


def _cost(text: str) -> tuple[str, float | list[float]]:
    key, _, values = text.partition("=")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not OP=COST, such as F=1 or F=1,1,1.5") from None
    return key, numbers[0] if len(numbers) == 1 else numbers


def build(name: str, stages: int, micro: int, queue: int | None) -> Schedule:
    """Returns a schedule by its number of stages.

    Raises:
        ValueError: the numbers do not fit it.
    """
    if name != "dualpipe_v":
        return SCHEDULES[name](stages, micro, queue)
    if stages % 2:
        raise ValueError(f"dualpipe_v: {stages} stages, must be even: two per rank")
    return SCHEDULES[name](stages // 2, micro, queue)


def formulas(schedule: Schedule, costs: Costs) -> tuple[float | None, int]:
    """(bubble, activations) by table 2 of the report; no bubble where costs differ over stages."""
    if any(isinstance(cost, list) for cost in costs.values()):
        bubble = None
    else:
        f, b, w = (costs[key] for key in "FBW")
        dual = (schedule.num_stages / 2 - 1) * (costs.get("F&B", f + b) + b - 3 * w)
        one_way = (schedule.num_stages - 1) * (f + b - 2 * w * (schedule.name == "zero_bubble"))
        bubble = dual if schedule.directions == 2 else one_way
    kept = schedule.num_micro if schedule.name == "gpipe" else schedule.num_stages
    return bubble, kept + (schedule.directions == 2)


def _row(schedule: Schedule, costs: Costs, timeline: Timeline) -> tuple[str, ...]:
    bubble, activations = formulas(schedule, costs)
    return (
        *(schedule.name, f"{schedule.num_ranks}", f"{timeline.makespan:.6g}"),
        *(f"{min(timeline.bubble):.6g}", f"{max(timeline.bubble):.6g}"),
        "-" if bubble is None else f"{bubble:.6g}",
        *(f"{max(timeline.peak)}", f"{activations}", f"{max(timeline.queue)}"),
        f"{synchronous(schedule, costs).makespan:.6g}",
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join(
        "  "
        + row[0].ljust(widths[0])
        + "".join(f"  {cell:>{n}}" for cell, n in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    costs = COSTS | dict(args.costs)
    found = [build(name, args.stages, args.micro, args.queue) for name in args.schedule]
    runs = [(schedule, simulate(schedule, costs)) for schedule in found]
    print(
        f"{args.stages} stages, {args.micro} micro-batches, "
        + ", ".join(f"{k}={v}" for k, v in costs.items())
    )
    print(_table([HEAD, *(_row(schedule, costs, timeline) for schedule, timeline in runs)]))
    print(
        "Formulas: without messages, the queue as deep as the schedule has it. Activations: micro-batches between forward\n"
        "and backward on one rank. Queue: weight gradients that wait. In ticks: the makespan where all ranks meet after\n"
        "each tick, as the program of a mesh does.",
        flush=True,
    )
    if args.out is not None:
        from experiments.planning.schedule_picture import draw

        write_file(args.out, draw(runs))
        print(f"picture: {args.out}", flush=True)
    return 0

"""`python -m experiments.plan cluster`: a day of DeepSeek's serving cluster, simulated.

    python -m experiments.plan cluster --out=day.png          # DeepSeek's published day, and a page of plots
    python -m experiments.plan cluster --compare              # a table of what-ifs: units, drafts, caches, GPUs
    python -m experiments.plan cluster --acceptance=0.8 --decode_devices=320 --hardware=h200    # one of your own
    python -m experiments.plan cluster --lost=decode --minutes=5                                # a unit fails
    python -m experiments.plan cluster --check                # the shortcuts beside a simulation of every device

Real: the scheduler with its pages, prefix keys and choice of ranks, and the router's choice, as the server runs them. Modelled:
seconds of a step, the roofline of `serving_times.py` times one constant per phase, fitted to DeepSeek's tokens per second and
node; users; the network between units; the disk. Extrapolated: of a decode unit's devices some are simulated, the slowest of the others
follows from the spread of these; each hour is a window of `--seconds`, and decode units look at what has come every four
steps. A run takes two minutes on one core, what-ifs half that each.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from deepseek_jax.data.text_files import write_file
from experiments import command_line
from experiments.planning.cluster import check, failure, report
from experiments.planning.cluster.cluster import Shape
from experiments.planning.cluster.day import Lapse, Rates, simulate
from experiments.planning.cluster.full import deepseek, sglang, uneven
from experiments.planning.cluster.setting import HOURS, Setting
from experiments.planning.hardware import PRESETS
from experiments.planning.units import Unit
from experiments.screen import SCREEN

PHYSICAL = 288  # experts of a layer with the redundant ones, as DeepSeek has them
WHAT_IF: tuple[tuple[str, dict[str, object]], ...] = (
    ("as published", {}),
    ("decode units of 320 GPUs", {"decode_devices": 320}),
    ("decode units of 72 GPUs", {"decode_devices": 72}),
    ("MTP, 80% of drafts accepted", {"acceptance": 0.8}),
    ("latents in FP8", {"fp8_latents": True}),
    ("prompts to devices as this engine gives them", {"balanced": False}),
    ("nothing in a cache", {"hits": 0.0}),
    ("80% in the cache", {"hits": 0.8}),
    ("a cache of one minute", {"kept": 1.0}),
    ("H200", {"hardware": "h200"}),
)


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    with SCREEN.doing("fitting a constant of each phase to DeepSeek's day"):
        base = deepseek(Setting())
    setting = _setting(base, args)
    if args.check:
        return _check(base, args)
    if args.lost:
        lost = failure.simulate_failure(
            setting, Shape(stride=args.stride), args.lost, args.minutes, args.seed
        )
        print(report.heading(setting), failure.report(lost), sep="\n\n", flush=True)
        return 0
    if args.compare:
        return _compare(base, args)
    lapse = _day(setting, args, "simulating a day")
    print(report.report(lapse, sglang(base), args.price), flush=True)
    if args.out is not None:
        from experiments.planning.cluster.picture import draw

        write_file(args.out, draw(lapse))
        print(f"picture: {args.out}", flush=True)
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="plan cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--hardware", choices=sorted(PRESETS), default="h800", help="which GPUs [h800]")
    add("--prefill_devices", type=_devices, default=32, help="GPUs of a prefill unit [32]")
    add("--decode_devices", type=_devices, default=144, help="GPUs of a decode unit [144]")
    add("--acceptance", type=_share, default=0.0, help="of MTP's drafts, those accepted; 0: no drafts [0]")
    add(
        "--fp8_latents", action="store_true", help="latents of 656 bytes per token and layer instead of 1,152"
    )
    add("--hits", type=_share, default=0.563, help="share of the input that conversations repeat [0.563]")
    add(
        "--kept", type=_positive, default=10.0, help="minutes of new tokens that the cache on disk holds [10]"
    )
    add(
        "--balanced",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompts are divided among prefill devices as DeepSeek says; else as this engine does [--balanced]",
    )
    add("--speed", type=_positive, default=20.0, help="tokens/s of a user, for which decode units run [20]")
    add("--busy", type=_share, default=0.85, help="share of prefill's throughput that is asked for [0.85]")
    add("--seconds", type=_positive, default=20.0, help="simulated of each hour [20]")
    add("--ranks", type=int, default=6, help="devices simulated of each of two decode units [6]")
    add("--stride", type=int, default=4, help="decode steps between two looks at what has come [4]")
    add("--seed", type=int, default=0, help="of lengths and arrivals [0]")
    add("--price", type=float, default=2.0, help="dollars per GPU-hour [2]")
    add("--lost", choices=("prefill", "decode"), help="a unit of this phase fails")
    add("--minutes", type=_positive, default=5.0, help="for so long [5]")
    add("--compare", action="store_true", help="a table of what-ifs, each a day of every third hour")
    add("--check", action="store_true", help="the shortcuts beside every device of a small cluster")
    add("--out", type=Path, help="a PNG file of plots")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix != ".png":
        parser.error(f"--out={args.out} must end in .png")
    if args.ranks < 2 or args.stride < 1:
        parser.error(f"--ranks={args.ranks} must be at least 2, and --stride={args.stride} at least 1")
    return args


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 1")
    return value


def _positive(text: str) -> float:
    if not 0 < (value := float(text)) < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be a positive number")
    return value


def _devices(text: str) -> int:
    if (value := int(text)) < 8 or value % 8 or value > 2048:
        raise argparse.ArgumentTypeError(f"{text} must be whole nodes of 8 GPUs, at most 2,048 GPUs")
    return value


def unit(devices: int, **more: bool) -> Unit:
    """With 32 redundant experts; where each device has one alone, the shared expert is one of them."""
    return Unit(devices // 8, experts=-(-PHYSICAL // devices), shared_routed=devices > PHYSICAL, **more)


def _setting(base: Setting, args: argparse.Namespace) -> Setting:
    more = {"fp8_latents": args.fp8_latents}
    setting = dataclasses.replace(
        base,
        hardware=PRESETS[args.hardware],
        prefill=unit(args.prefill_devices, **more),
        decode=unit(args.decode_devices, drafts=args.acceptance > 0, **more),
        day=dataclasses.replace(base.day, hits=args.hits),
        acceptance=args.acceptance,
        kept=args.kept,
        balanced=args.balanced,
        speed=args.speed,
        busy=args.busy,
    )
    return setting if setting == base else dataclasses.replace(setting, uneven=uneven(setting))


def shape_of(setting: Setting, ranks: int, stride: int) -> Shape:
    """So many devices of each of two decode units, and every device of a prefill unit: its slowest is far from the mean, and no
    spread among a few tells how far. More units, if these compute too few prompts for the answers."""
    shape = Shape(1, setting.prefill.devices, 2, ranks, stride)
    rates = Rates(setting, shape)
    most = max(rates.decode(hour) / rates.prefill(hour) for hour in range(HOURS))
    return shape._replace(prefill=max(1, math.ceil(most)))


def _day(setting: Setting, args: argparse.Namespace, name: str, hours: Sequence[int] = range(HOURS)) -> Lapse:
    shape = shape_of(setting, args.ranks, args.stride)
    with SCREEN.doing(name):
        return simulate(setting, shape, args.seconds, args.seed, hours, functools.partial(_hour, name))


def _hour(name: str, hour: int) -> None:
    SCREEN.line(f"{name}: {hour:02}:00")


def _compare(base: Setting, args: argparse.Namespace) -> int:
    lapses = []
    for name, changes in WHAT_IF:
        changed = argparse.Namespace(**(vars(args) | changes))
        lapses.append((name, _day(_setting(base, changed), args, name, range(1, HOURS, 3))))
    print(
        report.heading(base),
        report.compared(lapses, args.price),
        "\n".join(report.NOT),
        sep="\n\n",
        flush=True,
    )
    return 0


def _check(base: Setting, args: argparse.Namespace) -> int:
    """Units of 32 devices each."""
    setting = dataclasses.replace(base, decode=unit(32))
    whole = check.seen(setting, Shape(1, 32, 1, 32, 1), 60, 120, args.seed)
    short = check.seen(setting, shape_of(setting, args.ranks, args.stride), 60, 240, args.seed)
    print(check.report(whole, short), flush=True)
    return 0

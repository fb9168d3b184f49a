"""`python -m experiments.plan search`: the meshes on which a config fits so many GPUs, ranked by the predicted step.

Tries all pipe x data x node x local x tensor, micro-batches of 1, 2, 4, ... sequences, every recomputation policy, and overlap
on and off; the batch stays. Prints the ten fastest that fit, and why the fastest of the others do not.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import flags
from jax.sharding import AbstractMesh

from deepseek_jax.config import REMAT, Config, MeshConfig
from experiments import config_flag
from experiments.planning import times
from experiments.planning.footprint import footprint, least_bytes
from experiments.planning.hardware import GIB, PRESETS, Hardware
from experiments.planning.prediction import Prediction, predict
from experiments.planning.run import Run, run_of
from experiments.planning.step import common_flags
from experiments.planning.tables import table

SHOWN, TOO_LARGE = 10, 3
LARGEST_MICRO_BATCH = 16  # sequences per device


class Found(NamedTuple):
    """The fastest that fit, and the fastest that do not, one of each mesh; both by time. tried: runs that divide."""

    fit: list[Prediction]
    large: list[Prediction]
    tried: int


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def meshes(cfg: Config, devices: int, hardware: Hardware) -> Iterator[MeshConfig]:
    """Every mesh of so many devices over which heads and experts divide, whose axes local and tensor lie in a node, and are
    a whole one if experts spread over several nodes."""
    experts, heads = cfg.model.n_routed_experts, cfg.model.num_attention_heads
    for pipe, node, local, tensor in itertools.product(_divisors(devices), repeat=4):
        used, inside = pipe * node * local * tensor, local * tensor
        if devices % used or experts % (node * inside) or heads % tensor:
            continue
        if inside > hardware.node or (node > 1 and inside < hardware.node):
            continue
        if pipe > cfg.model.num_hidden_layers:
            continue
        layers = cfg.mesh.stage_layers if pipe == cfg.mesh.pipe else ()
        yield dataclasses.replace(
            cfg.mesh,
            pipe=pipe,
            data=devices // used,
            node=node,
            local=local,
            tensor=tensor,
            stage_layers=layers,
            schedule=cfg.mesh.schedule if pipe > 1 else "auto",
        )


def candidates(cfg: Config, devices: int, hardware: Hardware) -> Iterator[Run]:
    """Every run that divides over its mesh."""
    for mesh in meshes(cfg, devices, hardware):
        shards = mesh.data * mesh.node * mesh.local
        if cfg.train.batch_size % shards:
            continue
        for sequences, remat, overlap in itertools.product(_sizes(cfg, shards), REMAT, (True, False)):
            micros = cfg.train.batch_size // (shards * sequences)
            train = dataclasses.replace(cfg.train, grad_accumulation=micros, remat=remat)
            changed = dataclasses.replace(cfg, mesh=dataclasses.replace(mesh, overlap=overlap), train=train)
            try:
                yield run_of(changed, devices, hardware)
            except (
                ValueError
            ):  # too few micro-batches for the pipeline, nothing to overlap with, tokens do not divide
                continue


def _sizes(cfg: Config, shards: int) -> list[int]:
    """Sequences of a micro-batch."""
    each = cfg.train.batch_size // shards
    return [s for s in (1, 2, 4, 8, LARGEST_MICRO_BATCH) if each % s == 0]


def search(cfg: Config, devices: int, hardware: Hardware) -> Found:
    """The fastest runs, found in the order of a lower bound of their time: what is left out is not faster."""
    ordered = [(times.least_seconds(run), i, run) for i, run in enumerate(candidates(cfg, devices, hardware))]
    heapq.heapify(ordered)
    tried = len(ordered)
    fit: list[Prediction] = []
    large: dict[AbstractMesh, Prediction] = {}
    while ordered:
        bound, _, run = heapq.heappop(ordered)
        if len(fit) >= SHOWN and bound > sorted(p.step for p in fit)[SHOWN - 1]:
            break
        if (len(large) >= TOO_LARGE or run.mesh in large) and least_bytes(run) > hardware.usable:
            continue
        try:
            if len(large) >= TOO_LARGE and sum(footprint(run).values()) > hardware.usable:
                continue
            prediction = predict(run)
        except ValueError:  # a parameter does not divide over the mesh
            tried -= 1
            continue
        if prediction.fits:
            fit.append(prediction)
        elif run.mesh not in large or prediction.step < large[run.mesh].step:
            large[run.mesh] = prediction
    by_time = sorted(fit, key=lambda p: p.step), sorted(large.values(), key=lambda p: p.step)
    return Found(by_time[0][:SHOWN], by_time[1][:TOO_LARGE], tried)


# --- as text ------------------------------------------------------------------------------------------------------

COLUMNS = ("micro-batch", "remat", "overlap", "GiB", "bubble", "s/step", "MFU", "hours/T")


def _row(p: Prediction) -> tuple[str, list[str]]:
    run = p.run
    axes = ("pipe", "data", "node", "local", "tensor")
    bubble = (p.ran.bubble + p.ran.waiting) / p.step
    values = [
        f"{run.micros} x {run.sequences}",
        run.cfg.train.remat,
        "yes" if run.cfg.mesh.overlap else "no",
        f"{p.bytes / GIB:.1f}",
        f"{bubble:.1%}",
        f"{p.step:.3f}",
        f"{p.mfu:.1%}",
        f"{p.gpu_hours:,.0f}",
    ]
    return " x ".join(str(run.size(a)) for a in axes), values


def _why(p: Prediction) -> str:
    largest = sorted(p.memory.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {n / GIB:.1f}" for name, n in largest)
    return f"{p.bytes / GIB:.1f} GiB of {p.run.hardware.usable / GIB:.1f}: {parts}"


def report(found: Found, devices: int, hardware: Hardware) -> str:
    title = "pipe x data x node x local x tensor"
    lines = [f"{found.tried:,} ways to run on {devices} {hardware.name} divide; the fastest that fit:"]
    lines.append(table(title, COLUMNS, [_row(p) for p in found.fit]) if found.fit else "  none")
    if found.large:
        lines.append("the fastest that do not fit:")
        lines.append(table(title, COLUMNS, [_row(p) for p in found.large]))
        lines += [f"  {_row(p)[0]}, {p.run.cfg.train.remat}: {_why(p)}" for p in found.large]
    if found.fit:
        best = found.fit[0].run
        m, t = best.cfg.mesh, best.cfg.train
        axes = " ".join(f"--config.mesh.{a}={best.size(a)}" for a in best.mesh.shape)
        lines.append(
            f"the first: {axes} --config.mesh.overlap={m.overlap} --config.train.grad_accumulation={t.grad_accumulation} "
            f"--config.train.remat={t.remat}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    common_flags(values)
    flags.DEFINE_integer("devices", 2048, "How many.", 1, 1 << 16, flag_values=values)
    cfg = config_flag.parse(argv, "configs/v3_671b.py", values, any_stage=True)
    hardware = PRESETS[values.hardware]
    found = search(cfg, values.devices, hardware)
    if not found.tried:
        raise ValueError(
            f"no mesh of {values.devices} devices divides train.batch_size={cfg.train.batch_size} and the model; change "
            "--devices or config.train.batch_size"
        )
    print(report(found, values.devices, hardware))
    return 0

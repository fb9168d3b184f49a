"""Predictions as text."""

from collections.abc import Sequence

from experiments.planning import links, times
from experiments.planning.hardware import GIB
from experiments.planning.memory import UNITS
from experiments.planning.prediction import Prediction
from experiments.planning.run import Run


def table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A title, column heads and rows of a name and values, the latter aligned to the right."""
    width = max(len(x) for x in (title, *(name for name, _ in rows))) + 2
    widths = [max(len(c), *(len(v[i]) for _, v in rows), 8) + 2 for i, c in enumerate(columns)]
    lines = [(title, columns), *rows]
    return "\n".join((f"  {name:<{width}}" + _cells(values, widths)).rstrip() for name, values in lines)


def _cells(values: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{v:>{w}}" for v, w in zip(values, widths, strict=True))


def mesh(run: Run) -> str:
    return " x ".join(f"{axis}={n}" for axis, n in run.mesh.shape.items() if n > 1) or "one device"


def heading(run: Run) -> str:
    cfg, m = run.cfg, run.model
    lines = [
        f"{run.devices} {run.hardware.name}: {mesh(run)}; {cfg.precision}, remat={cfg.train.remat}, "
        f"overlap={cfg.mesh.overlap}, zero={cfg.mesh.zero}",
        f"{cfg.train.batch_size:,} sequences of {cfg.data.seq_len:,} tokens per step, in {run.micros} micro-batches of "
        f"{run.sequences} per device",
        f"{m.num_params():,} parameters, {m.num_active_params():,} active, {m.num_mtp_params():,} more in MTP modules; "
        f"{m.flops_per_token(cfg.data.seq_len) / 1e9:.2f} GFLOP per token, "
        f"{m.flops_per_token(cfg.data.seq_len) * run.tokens_per_step:.3e} FLOP per step (without MTP)",
    ]
    if run.pipeline is not None:
        layers = " ".join(str(len(s.dense) + len(s.moe)) for s in run.stages)
        lines.insert(
            1, f"{run.pipeline.name}: stages of {layers} layers, weight_queue={run.pipeline.weight_queue}"
        )
    return "\n".join(lines)


def unit_of(total: float) -> str:
    """GiB, or MiB where all is less than one."""
    return "GiB" if total >= UNITS["GiB"] else "MiB"


def memory(p: Prediction) -> str:
    unit = unit_of(p.bytes)
    rows = [(name, [f"{n / UNITS[unit]:.2f}"]) for name, n in (*p.memory.items(), ("all", p.bytes))]
    verdict = "fits" if p.fits else "DOES NOT FIT"
    usable = p.run.hardware.usable / UNITS["GiB"]
    return f"{table('memory per device', [unit], rows)}\n  {verdict}: {usable:.1f} GiB are there for a run"


def traffic(run: Run) -> str:
    rows = [
        (name, [f"{b[link] / GIB:.1f}" for link in ("nvlink", "nic")])
        for name, b in links.of_step(run).items()
    ]
    return table("sent by the busiest device in a step", ["NVLink GiB", "NIC GiB"], rows)


def phases(run: Run) -> str:
    moe, dense = (times.layer(run, is_moe) for is_moe in (True, False))
    rows = [("attention", moe.attention)] if run.model.num_moe_layers else [("attention", dense.attention)]
    if run.model.first_k_dense_replace:
        rows.append(("MLP, dense", dense.mlp))
    if run.model.num_moe_layers:
        rows.append(("MLP, experts", moe.mlp))
    found = [(name, [f"{1e3 * x:.2f}" for x in t]) for name, t in rows]
    if run.wire is not None:
        ways = (
            ("dispatch", moe.dispatch, moe.combine_gradient),
            ("combine", moe.combine, moe.dispatch_gradient),
        )
        found += [(name, [f"{1e3 * f:.2f}", f"{1e3 * b:.2f}", ""]) for name, f, b in ways]
    return table("a layer and micro-batch, ms", ["forward", "backward", "weights"], found)


_NAMES = {"F": "forwards alone", "B": "backwards alone", "W": "weight gradients alone", "F&B": "pairs"}


def seconds(p: Prediction) -> str:
    names = _NAMES if p.run.pipe > 1 else {"F": "forward", "B": "backward"}
    rows = [(names.get(name, name), [f"{s:.3f}"]) for name, s in p.parts.items()]
    return table("a step", ["seconds"], [*rows, ("all", [f"{p.step:.3f}"])])


def outcome(p: Prediction, price: float) -> str:
    return (
        f"{p.step:.3f} s per step, {p.mfu:.1%} MFU of the BF16 peak, {p.tokens_per_day / 1e9:,.2f}B tokens per day, "
        f"{p.gpu_hours:,.0f} GPU-hours and ${p.gpu_hours * price:,.0f} per trillion tokens"
    )


def report(p: Prediction, price: float) -> str:
    blocks = (heading(p.run), memory(p), traffic(p.run), phases(p.run), seconds(p), outcome(p, price))
    return "\n\n".join(blocks)

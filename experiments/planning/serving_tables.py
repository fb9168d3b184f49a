"""The prediction of a deployment unit as a page of text."""

from experiments.planning.hardware import GIB
from experiments.planning.serving_prediction import Prediction, Step
from experiments.planning.serving_times import EXCHANGE, Parts
from experiments.planning.serving_weights import pages_of
from experiments.planning.tables import table

# DeepSeek's inference overview (February 2025), 24 hours of its online service: tokens per second of a GPU; its prefill without
# what was found in the cache (73.7k per node, 56.3% of them).
MEASURED = {"decode": 14_800 / 8, "prefill": 73_700 * (1 - 0.563) / 8}
ONLINE = {"decode": (18, 8), "prefill": (4, 8)}

NOTES = """\
How to read this. Measured: the rates at which kernels compute and read memory, and at which links carry rows (the sources
stand in experiments/planning/hardware.py and serving_links.py); of this project's own kernels those for H100, of DeepSeek's
projects those for H800. Computed from them: everything above. Nothing is fitted to a step's time, and not counted are the
starts of some 1,500 kernels, devices that wait for one another, experts that get more rows than others, and the host: expect
a real step to take longer. No unit of this size has run this code."""


def report(p: Prediction) -> str:
    blocks = [heading(p), memory(p), requests(p)]
    for step in p.steps:
        blocks += [seconds(p, step), links(step), outcome(p, step)]
    return "\n\n".join([*blocks, NOTES])


def heading(p: Prediction) -> str:
    u, m = p.unit, p.unit.model
    axes = " x ".join(f"{a}={n}" for a in ("node", "local", "tensor") if (n := getattr(u.mesh, a)) > 1)
    attention = "attends to its own sequences"
    if u.mesh.tensor > 1:
        attention = f"shares prompts and heads with {u.mesh.tensor - 1} others"
    shared = "none"
    if m.n_shared_experts:
        shared = "one more routed expert" if u.shared_routed else "whole on each device"
    return (
        f"{u.devices} {p.hardware.name} ({axes or 'one device'}) that serve together, role {u.role}: each {attention}, and holds "
        f"{u.experts} of\n{u.physical_experts} experts of a layer, {u.redundant} of them redundant; shared expert: {shared}; "
        f"weights in {u.weights.upper()}, latents in {'FP8' if u.cache == 'fp8' else m.dtype}."
    )


def memory(p: Prediction) -> str:
    found = p.memory
    parts: dict[str, float] = {f"weights: {name}": n for name, n in found.weights.items()}
    parts |= {"state of sequences": found.state} | {f"a step: {name}": n for name, n in found.step.items()}
    parts["pages of latents"] = found.pages * found.page
    rows = [(name, [f"{n / GIB:.2f}"]) for name, n in (*parts.items(), ("all", sum(parts.values())))]
    verdict = "fits" if found.fits else "DOES NOT FIT"
    return f"{table('memory per device', ['GiB'], rows)}\n  {verdict}: {found.usable / GIB:.1f} GiB are there"


def requests(p: Prediction) -> str:
    found, tokens = p.memory, p.context
    return (
        f"{found.pages:,} pages of 64 tokens, {found.page / 2**20:.2f} MiB each. A sequence of {tokens:,} tokens takes "
        f"{pages_of(tokens)}: there is room for {found.requests(tokens)} on a\ndevice, and rows for {p.unit.rows}. Of "
        f"{p.unit.max_model_len:,} tokens, the longest, {found.requests(p.unit.max_model_len)} fit."
    )


def _what(p: Prediction, step: Step) -> str:
    if step.phase == "decode":
        pair = ", each with a draft" if p.unit.drafts else ""
        return f"a decode step: {step.rows:.0f} sequences of a device, {p.context:,} tokens each{pair}"
    cached = f", of which {p.cached:,} are cached" if p.cached else ""
    return f"a step of prefill: {step.tokens:,.0f} tokens of a device, of prompts of {p.context:,}{cached}"


def seconds(p: Prediction, step: Step) -> str:
    """Part by part; the exchange as DeepEP does it."""
    rows = []
    for name, part in step.deepep.parts.items():
        cells = [part.seconds * 1e3, part.flops / 1e12, (part.read + part.latents) / 1e9]
        rows.append((name, [f"{cells[0]:.2f}", f"{cells[1]:.2f}", f"{cells[2]:.2f}"]))
    total = step.deepep.total
    rows.append(
        (
            "all",
            [
                f"{1e3 * total.seconds:.2f}",
                f"{total.flops / 1e12:.2f}",
                f"{(total.read + total.latents) / 1e9:.2f}",
            ],
        )
    )
    return f"{_what(p, step)}\n" + table("", ["ms", "TFLOP", "GB read"], rows)


def links(step: Step) -> str:
    """Bytes that a device sends in a step, by DeepEP's exchange and by this project's."""
    rows = []
    for name in (*EXCHANGE, "attention over tensor"):
        if name in step.deepep.parts:
            a, b = step.deepep[name], step.house[name]
            rows.append((name, [f"{x / 1e6:.1f}" for x in (a.nvlink, a.nic, b.nvlink, b.nic)]))
    columns = ["DeepEP: NVLink", "NIC", "here: NVLink", "NIC"]
    return table("MB sent by a device in a step", columns, rows)


def outcome(p: Prediction, step: Step) -> str:
    rows = []
    for name, parts in (("DeepEP's exchange", step.deepep), ("this project's exchange", step.house)):
        for way, took in (("one after the other", parts.serial), ("two micro-batches", parts.overlapped)):
            device = step.per_second(took)
            rows.append((f"{name}, {way}", [f"{1e3 * took:.1f}", f"{device:,.0f}", f"{8 * device:,.0f}"]))
    text = table("a step", ["ms", "tokens/s per GPU", "per node of 8"], rows)
    return f"{text}\n{_bound(step.deepep)}{_beside(p, step)}"


def _bound(parts: Parts) -> str:
    arithmetic, exchange = (1e3 * s for s in parts.halves)
    return f"  two micro-batches: {arithmetic:.1f} ms of arithmetic, weights read twice, beside {exchange:.1f} ms of exchange"


def _beside(p: Prediction, step: Step) -> str:
    """What DeepSeek measured, where the unit is the one."""
    mesh = p.unit.mesh
    same = (mesh.node, mesh.local) == ONLINE[step.phase] and mesh.tensor == 1 and p.hardware.name == "h800"
    if not same or p.unit.model.num_params() != 671_026_419_200:
        return ""
    return f"\n  DeepSeek measured {MEASURED[step.phase]:,.0f} tokens/s per GPU on such a unit, in the mean of a day"

"""Bytes that a device sends, per link and step, and the seconds that they take.

Tokens to their experts and back (by the counts of `study/traffic.py`, in the formats of the wire), activations between
neighbours of the pipeline, latents and outputs over `tensor`, compute copies and gradients of ZeRO-1.
"""

import functools
from typing import Any, NamedTuple

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.exchange.wire import SCALES
from deepseek_jax.parallel.mesh import EXPERT_AXES, TOKEN_AXES, expert_exchange
from experiments.planning.run import Run
from experiments.study.traffic import routing_bytes, row_bytes, sample_rows

SAMPLED = 4000  # tokens, of which rows are counted: within 1%

Bytes = dict[str, float]  # "nvlink", "nic" -> bytes


def _by_link(run: Run, *parts: tuple[str, float]) -> Bytes:
    """Adds up bytes over mesh axes: those along an axis go over its link."""
    found = {"nvlink": 0.0, "nic": 0.0}
    for axis, amount in parts:
        found["nvlink" if run.link(axis) is run.hardware.nvlink else "nic"] += amount
    return found


def seconds(run: Run, amount: Bytes) -> float:
    """One link after the other."""
    return amount["nvlink"] / run.hardware.nvlink.reached + amount["nic"] / run.hardware.nic.reached


# --- tokens and experts -------------------------------------------------------------------------------------------


@functools.lru_cache(256)
def _rows(model: ModelConfig, nodes: int, local: int) -> tuple[float, float, float]:
    """Mean rows per token: between nodes by a row per device, by a row per node, and forwarded inside nodes."""
    rows = sample_rows(model, nodes, local, SAMPLED)
    return float(rows.flat.mean()), float(rows.two_hop.mean()), float(rows.forwarded.mean())


def rows_per_token(run: Run) -> tuple[float, float]:
    """Rows that a token makes on its way to the experts: along `node`, and inside."""
    nodes, inside = run.size("node"), run.size("local") * run.size("tensor")
    flat, two_hop, forwarded = _rows(run.model, nodes, inside)
    if expert_exchange(run.cfg.mesh, run.mesh) == "two_hop":
        return two_hop, forwarded
    return flat, _rows(run.model, 1, nodes * inside)[2] - flat


def _row(run: Run, way: str, gradient: bool) -> int:
    """Bytes of a row. `way`: "dispatch" or "combine", gradients with that of the other."""
    assert run.wire is not None
    form = run.wire.dispatch if way == "dispatch" else run.wire.combine
    wide = form == "same" and run.act == 4
    size = row_bytes(run.model.hidden_size, form if form in SCALES else "bf16") * (2 if wide else 1)
    return size + (0 if gradient or way == "combine" else 2 * routing_bytes(run.model.num_experts_per_tok))


def trip(run: Run, way: str, gradient: bool = False) -> Bytes:
    """Bytes that a device sends in one dispatch or combine of a layer and micro-batch. The gradient of a combine is a
    dispatch, that of a dispatch a combine."""
    if run.wire is None:
        return _by_link(run)
    between, inside = rows_per_token(run)
    row = run.tokens * _row(run, way, gradient)
    return _by_link(run, ("node", between * row), ("local", inside * row))


def trip_seconds(run: Run, way: str, gradient: bool = False, share: float = 1.0) -> float:
    """Of one dispatch or combine with a `share` of the tokens; its hops follow each other."""
    amount = {link: share * n for link, n in trip(run, way, gradient).items()}
    return 0.0 if run.wire is None else seconds(run, amount) + run.hardware.exchange_start


# --- activations --------------------------------------------------------------------------------------------------


def hop(run: Run) -> Bytes:
    """Of one activation, or its gradient, to a neighbour in the pipeline."""
    return _by_link(run, ("pipe", run.tokens * run.model.hidden_size * run.act if run.pipe > 1 else 0.0))


def divided(run: Run) -> Bytes:
    """Over `tensor`: latents are gathered and outputs scattered, once per layer and direction."""
    m = run.model
    low = (m.q_lora_rank or m.hidden_size) + m.kv_lora_rank + m.qk_rope_head_dim
    others = run.size("tensor") - 1
    return _by_link(run, ("tensor", others * run.tokens * (low + m.hidden_size) * run.act))


# --- parameters ---------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Parameters that a device puts together for a step: of linear layers, tables and float32 matrices; of experts; norms."""

    linear: float = 0.0
    tables: float = 0.0
    float32: float = 0.0
    experts: float = 0.0
    norms: float = 0.0


def counts(run: Run) -> Counts:
    """Of all layers that lie in a device's slots. The embedding, the head and MTP modules lie on every rank of a pipeline."""
    found = Counts()
    for name, tree in model_params(run.model).items():
        for p in _leaves(tree):
            size = 1.0
            for n in p.shape:
                size *= n
            if run.pipeline and name in run.pipeline.held.slots:
                size *= sum(run.pipeline.held.slots[name]) / p.shape[0]
            found = _add(found, p, size / run.expert_devices if "expert" in p.axes else size)
    return found


def _leaves(tree: Any) -> list[Any]:
    return [p for x in tree.values() for p in _leaves(x)] if isinstance(tree, dict) else [tree]


def _add(found: Counts, p: Any, size: float) -> Counts:
    if "expert" in p.axes and p.n_in is not None:
        kind = "experts"
    elif p.n_in is not None:
        kind = "linear"
    elif "vocab" in p.axes:
        kind = "tables"
    else:
        kind = "norms" if sum(axis != "layer" for axis in p.axes) < 2 else "float32"
    return found._replace(**{kind: getattr(found, kind) + size})


def _ring(run: Run, axes: tuple[str, ...]) -> tuple[float, str, int]:
    """(bytes/s of a ring over mesh axes, its slowest link, its devices): the NICs of those in one node work together."""
    parts, together = 1, 1
    for axis in axes:
        parts *= run.size(axis)
        together *= max(1, min(run.size(axis), run.hardware.node // run.stride(axis)))
    nvlink, nic = run.hardware.nvlink.reached, run.hardware.nic.reached
    if together >= parts:
        return nvlink, "nvlink", parts
    return (min(nvlink, together * nic) if together > 1 else nic), "nic", parts


class Zero(NamedTuple):
    """Of the gather before and the scatter after a step: seconds, and bytes that a device receives."""

    seconds: float
    bytes: Bytes


def zero(run: Run) -> Zero:
    """Compute copies to the devices that need them, float32 gradients to those that own them. Without `mesh.zero`,
    gradients are added up on all: twice the bytes."""
    c, item = counts(run), 1.0 if run.fp8 else float(run.act)
    gathered = {"dense": item * c.linear + run.act * c.tables + 4 * c.float32, "experts": item * c.experts}
    scattered = {"dense": 4 * (c.linear + c.tables + c.float32), "experts": 4 * c.experts}
    spent, moved = 0.0, {"nvlink": 0.0, "nic": 0.0}
    for kind in ("dense", "experts"):
        spread = run.expert_devices > 1 and kind == "experts"
        axes = tuple(a for a in TOKEN_AXES if not (spread and a in EXPERT_AXES))
        amount = gathered[kind] + scattered[kind] if run.cfg.mesh.zero else 2 * scattered[kind]
        speed, link, parts = _ring(run, axes)
        among_ranks = amount / parts * (1 - 1 / run.pipe)
        moved[link] += amount * (1 - 1 / parts)
        spent += amount * (1 - 1 / parts) / speed + among_ranks / run.link("pipe").reached
        for where, n in _by_link(run, ("pipe", among_ranks)).items():
            moved[where] += n
    return Zero(spent, moved)


# --- of a step ----------------------------------------------------------------------------------------------------


def _times(amount: Bytes, factor: float) -> Bytes:
    return {link: factor * n for link, n in amount.items()}


def _plus(*amounts: Bytes) -> Bytes:
    return {link: sum(a[link] for a in amounts) for link in ("nvlink", "nic")}


def of_step(run: Run) -> dict[str, Bytes]:
    """What the busiest device of a pipeline sends per step: the one with the most MoE layers to pass."""
    moe, layers = _passed(run)
    both = 2 if run.cfg.train.remat != "full" else 3
    again = 1 if run.cfg.train.remat == "full" else 0
    forward = _times(trip(run, "dispatch"), 1 + again)
    messages = (
        2
        * run.micros
        * (run.pipeline.held.chunks if run.pipeline and run.pipeline.name == "dualpipe_v" else 1)
    )
    return {
        "dispatch": _times(_plus(forward, trip(run, "dispatch", True)), moe),
        "combine": _times(_plus(trip(run, "combine"), trip(run, "combine", True)), moe),
        "pipeline hops": _times(hop(run), messages),
        "tensor parallel": _times(divided(run), both * layers),
        "ZeRO gather and scatter": zero(run).bytes,
    }


def _passed(run: Run) -> tuple[float, float]:
    """(MoE layers, layers) that micro-batches pass on the rank with most of the former, MTP modules included."""
    depth = run.model.num_nextn_predict_layers
    sizes = [(len(s.moe) + depth * s.last, len(s.dense) + len(s.moe) + depth * s.last) for s in run.stages]
    if run.pipeline is None:
        return sizes[0][0] * run.micros, sizes[0][1] * run.micros
    schedule = run.table().schedule
    ratio = run.micros / schedule.num_micro
    ranks = [
        [(ratio * schedule.micros(d), sizes[schedule.stage(r, d)]) for d in range(schedule.directions)]
        for r in range(run.pipe)
    ]
    return max((sum(m * moe for m, (moe, _) in rank), sum(m * n for m, (_, n) in rank)) for rank in ranks)

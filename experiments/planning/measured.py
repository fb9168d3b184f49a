"""DeepSeek-V3's step as DeepSeek measured it on 2,048 H800s, beside the predicted one, part by part.

Sources: "Insights into DeepSeek-V3" (arXiv 2505.09343), table 4, which tells no more of the step's parts than their names;
of a layer, the published profile of a pair (profile-data, train.json: 4 MoE layers, 64-way experts, 4,096 tokens). No number of
table 4 goes into a prediction; of the profile, some rates do (`hardware.py`).
"""

import dataclasses
from typing import NamedTuple

from deepseek_jax.config import ModelConfig
from experiments.planning import links, times
from experiments.planning.prediction import Prediction, gpu_hours
from experiments.planning.run import Run
from experiments.planning.tables import table

STEP = 19.926
SECONDS = {"F": 1.13, "B": 1.99, "W": 0.48, "F&B": 13.95, "bubble": 2.06, "optimizer": 0.29}
NAMES = {"F": "1F", "B": "1B", "W": "1W", "F&B": "1F1B"}
GPU_HOURS = 180e3  # per trillion tokens (report section 1)
PAIR, PAIR_LAYERS = 129.0, 4  # ms
# ms per layer; MLP(W) runs on two streams: what both are busy, less the other phases
PHASES = {
    "attention(F)": 4.36,
    "MLP(F)": 4.60,
    "attention(B)": 9.34,
    "MLP(B)": 5.31,
    "attention(W)": 2.39,
    "MLP(W)": 5.08,
    "dispatch(F)": 6.69,
    "combine(F)": 8.68,
    "combine(B)": 5.77,
    "dispatch(B)": 7.49,
}


class Part(NamedTuple):
    """A part of the step: seconds measured and predicted, ops of a rank, and what explains the error."""

    name: str
    measured: float
    predicted: float
    ops: float
    why: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def applies(run: Run) -> bool:
    """Whether a run is the one that was measured: model, machines, mesh, batch and numbers."""
    model, cfg = run.model, run.cfg
    v3 = dataclasses.replace(
        ModelConfig(),
        dtype=model.dtype,
        rope_scaling=model.rope_scaling,
        max_position_embeddings=model.max_position_embeddings,
    )
    mesh = tuple(run.mesh.shape.values()) == (16, 2, 8, 8, 1) and cfg.mesh.overlap
    ordered = (cfg.mesh.schedule, cfg.train.remat) in (("auto", "deepseek"), ("dualpipe", "deepseek"))
    batch = (cfg.train.batch_size, cfg.data.seq_len, run.micros) == (15360, 4096, 120)
    return model == v3 and run.hardware.name == "h800" and mesh and ordered and batch and run.fp8


# --- the step -----------------------------------------------------------------------------------------------------


def _inside_nodes(run: Run, forwards: float) -> float:
    """Seconds in which so many forwards alone forward rows inside nodes: DeepEP does that while others arrive."""
    hops = [links.trip(run, way)["nvlink"] / run.hardware.nvlink.reached for way in ("dispatch", "combine")]
    return forwards * _layers(run) * sum(hops)


def _gate(run: Run) -> float:
    """Seconds of a step in which gates are multiplied in float32, without Tensor Cores."""
    m = run.model
    flops = 6.0 * run.tokens * m.hidden_size * m.n_routed_experts * run.micros
    return _layers(run) * flops / run.hardware.linear["float32"].fprop


def _layers(run: Run) -> float:
    """MoE layers of a stage, in the mean."""
    return (run.model.num_moe_layers + run.model.num_nextn_predict_layers) / run.pipe


def _each(part: str, ops: float) -> float:
    """ms of an op as measured."""
    return 1e3 * SECONDS[part] / ops


def parts(prediction: Prediction) -> list[Part]:
    """The parts of the step, as DualPipe runs on ranks that go on by themselves; their predictions add up to the step's."""
    run = prediction.run
    ran = times.as_deepseek(run)
    n = ran.ops
    pair, x = 1e3 * pair_seconds(run), times.layer(run, True)
    forward = 1e3 * PAIR_LAYERS * (x.attention.forward + x.mlp.forward)
    why = {
        "F": f"{_each('F', n['F']):.0f} ms each as measured, if a rank has as many. The hops of an exchange follow each other "
        f"here: forwarding inside nodes while rows arrive, as DeepEP does, saves {_inside_nodes(run, n['F']):.2f} s. The rest "
        f"is not explained: the arithmetic of four layers alone takes {forward:.0f} ms",
        "B": "exchanges of a backward alone are hidden behind its own weight gradients only",
        "W": "depends on how many of the backwards alone are split: the queue is DeepSeek's, without a bound",
        "F&B": f"{_each('F&B', n['F&B']):.0f} ms each as measured, {PAIR:.0f} in the profile, {pair:.0f} predicted for its four "
        f"layers: as many of the profile's pairs take {n['F&B'] * PAIR / 1e3:.2f} s. Routing is taken as balanced; the profile's rank got up to "
        f"12% more rows. Gates in float32, which DeepSeek multiplies in BF16, are {_gate(run):.2f} s of the prediction",
        "bubble": "what ranks wait for one another because of routing, clocks and network is bubble there, and here all are "
        "alike; the table does not say whose bubble it is",
        "optimizer": "embedding, head and MTP module are gathered and scattered on every rank, and experts' compute copies "
        "and float32 gradients cross the network one after the other; DeepSeek does not say what it hides",
    }
    found = {**ran.parts, "bubble": ran.bubble, "optimizer": prediction.optimizer}
    return [Part(name, s, found[name], n.get(name, 0.0), why[name]) for name, s in SECONDS.items()]


def report(prediction: Prediction) -> str:
    run, rows = prediction.run, parts(prediction)
    total = sum(part.predicted for part in rows)
    lines = [
        (
            NAMES.get(p.name, p.name),
            [f"{p.measured:.2f}", f"{p.predicted:.2f}", f"{p.error:+.0%}", f"{p.ops:.1f}" if p.ops else ""],
        )
        for p in rows
    ]
    lines += [
        ("step, s", _against(STEP, total, ".3f")),
        ("as this project runs it, s", _against(STEP, prediction.step, ".3f")),
    ]
    hours = gpu_hours(total, run.tokens_per_step, run.devices)
    lines.append(("GPU-hours per trillion", _against(GPU_HOURS, hours, ",.0f")))
    reasons = [f"  {NAMES.get(p.name, p.name)}: {p.why}." for p in rows]
    reasons.append(f"  As this project runs it: {_difference(prediction)}.")
    title, columns = "DeepSeek-V3 as measured", ["measured", "predicted", "error", "ops of a rank"]
    return "\n".join([phases(run), "", table(title, columns, lines), *reasons])


def _difference(prediction: Prediction) -> str:
    """Why this project's step is another than that which its phases make as DeepSeek orders them."""
    run, ran = prediction.run, prediction.ran
    layers = [times.layer(run, True)] * PAIR_LAYERS
    mine, theirs = (1e3 * f(layers, layers) for f in (times.segments_seconds, times.pair_seconds))
    return (
        f"a pair of four layers takes {mine:.0f} ms for {theirs:.0f}, because a trip and the work beside it wait for each other; "
        "head and MTP modules run forward and backward in the last stage's backward, alone; and ranks exchange messages "
        f"with their neighbours after every tick, for which they wait {ran.waiting:.2f} s, since stages are not alike"
    )


def _against(measured: float, predicted: float, form: str) -> list[str]:
    return [f"{measured:{form}}", f"{predicted:{form}}", f"{predicted / measured - 1:+.1%}", ""]


# --- a pair -------------------------------------------------------------------------------------------------------


def pair_seconds(run: Run) -> float:
    """Of the profile's pair."""
    layers = [times.layer(run, True)] * PAIR_LAYERS
    return times.pair_seconds(layers, layers)


def predicted_phases(run: Run) -> dict[str, float]:
    """ms of each of `PHASES`."""
    x = times.layer(run, True)
    seconds = (
        *(x.attention.forward, x.mlp.forward, x.attention.backward, x.mlp.backward),
        *(x.attention.weights, x.mlp.weights),
        *(x.dispatch, x.combine, x.combine_gradient, x.dispatch_gradient),
    )
    return dict(zip(PHASES, (1e3 * s for s in seconds), strict=True))


def phases(run: Run) -> str:
    predicted = predicted_phases(run)
    lines = [(name, _against(ms, predicted[name], ".2f")[:3]) for name, ms in PHASES.items()]
    lines.append(("the pair of four layers", _against(PAIR, 1e3 * pair_seconds(run), ".1f")[:3]))
    title = "DeepSeek's profile, ms per layer"
    note = "  exchanges: the profile's kernels share the links with others and wait for peers; the links here are reached alone."
    return table(title, ["measured", "predicted", "error"], lines) + "\n" + note

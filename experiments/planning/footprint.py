"""Bytes on a device in a step, part by part: an upper bound, since not all parts are at their largest at the same time.

State, compute copy and gradients are those of `study/memory.py`, buffers of the exchange those of `study/exchange_memory.py`:
both are read off the layout that training plans. Activations are added up here, as `model/recompute.py` and the layers' own
backward passes keep them.
"""

import functools
from collections.abc import Iterable

from deepseek_jax.parallel.pipeline.stages import Stage
from experiments.planning.links import counts
from experiments.planning.run import E5M6, Run
from experiments.planning.work import widths
from experiments.study.exchange_memory import exchange_buffers
from experiments.study.memory import Memory, state_memory


@functools.lru_cache(512)
def state(run: Run) -> Memory:
    """Of dense parameters and experts together."""
    return Memory(*map(sum, zip(*state_memory(run.cfg, run.mesh).values(), strict=True)))


# --- kept for the backward pass -----------------------------------------------------------------------------------


def _attention_kept(run: Run) -> float:
    """Bytes per token; the norm's input is the stream."""
    w, a = widths(run), run.act
    stream, output = w.d * a, w.values * (E5M6 if run.fp8 else a) + 4 * run.model.num_attention_heads
    if run.cfg.train.remat == "full":
        return stream
    if run.cfg.train.remat == "deepseek":
        return stream + w.low * a + output
    operands = (w.d + w.q + w.c) * run.operand + (w.q + w.c) * a
    return stream + w.low * a + operands + (2 * w.queries + w.values) * a + output


def _mlp_kept(run: Run, is_moe: bool) -> float:
    """Bytes per token. Rows of experts take the buffers that they come in."""
    m, d = run.model, run.model.hidden_size
    indices = 3 * 4 * m.num_experts_per_tok if is_moe else 0
    if run.cfg.train.remat == "full":
        return indices
    stream = d * run.act + (d * run.operand if run.cfg.train.remat == "none" else 0)
    if not is_moe:
        return stream + 2 * m.intermediate_size * run.operand
    shared = 2 * m.n_shared_experts * m.moe_intermediate_size * run.operand
    received = run.cfg.mesh.receive or run.expert_devices if run.wire is not None else 1
    routed = received * d * run.operand + run.capacity * 2 * m.moe_intermediate_size * run.operand
    return stream + 4 * m.n_routed_experts + indices + shared + routed


def kept(run: Run, stage: Stage) -> float:
    """Bytes that a micro-batch's forward pass through a stage keeps."""
    attention, d = _attention_kept(run), run.model.hidden_size
    dense, moe = attention + _mlp_kept(run, False), attention + _mlp_kept(run, True)
    per_token = len(stage.dense) * dense + len(stage.moe) * moe
    if stage.last:  # the stream, of which the end is made again
        per_token += d * run.act
    return run.tokens * per_token


def cut(run: Run, stage: Stage) -> float:
    """Bytes that a backward keeps for the gradients of a stage's weights: both operands of each product."""
    m, w, a = run.model, widths(run), run.act
    attention = (w.d + w.q + w.c) * run.operand + w.values * a + (w.low + w.queries + w.keys_values + w.d) * a

    def ffn(width: int) -> float:
        return w.d * run.operand + 3 * width * a + w.d * run.operand

    experts = run.capacity * ffn(m.moe_intermediate_size) + ffn(m.n_shared_experts * m.moe_intermediate_size)
    dense, moe = attention + ffn(m.intermediate_size), attention + experts
    return run.tokens * (len(stage.dense) * dense + len(stage.moe) * moe)


# --- while it computes --------------------------------------------------------------------------------------------


def _working(run: Run) -> float:
    """Arrays of the layer at hand: of an attention's backward pass queries, keys, values, output and their gradients (scores
    never leave the kernel's registers); of experts, rows of inputs, results and SwiGLU, twice."""
    m, w, a = run.model, widths(run), run.act
    heads = 2 * (2 * w.queries + 2 * w.values) * a
    rows = (
        run.capacity * (2 * m.hidden_size + 3 * m.moe_intermediate_size) * a
        if run.model.num_moe_layers
        else 0
    )
    both = 2 if run.pipeline and run.cfg.mesh.overlap else 1
    return both * run.tokens * (max(heads, 2 * rows) if both == 1 else heads / 2 + rows)


def _end(run: Run) -> float:
    """After the last layer: of a chunk of tokens float32 logits, their exponentials, and gradients in the compute dtype;
    what MTP modules keep; and the gradients of a micro-batch, of embedding, head (summed in float32) and modules."""
    tokens, depth = min(run.cfg.train.loss_chunk, run.tokens), run.model.num_nextn_predict_layers
    logits = tokens * run.model.vocab_size * (4.0 + 4 + run.act)
    d = run.model.hidden_size
    modules = run.tokens * depth * (_attention_kept(run) + _mlp_kept(run, True) + 5 * d * run.act)
    gradients = d * run.model.vocab_size * (2 * run.act + 4.0)
    return logits + modules + (gradients if run.pipeline else 4.0 * d * run.model.vocab_size)


def _largest(sizes: Iterable[float]) -> float:
    return max(sizes, default=0.0)


@functools.lru_cache(16)
def footprint(run: Run) -> dict[str, float]:
    """Part -> bytes. One program runs on all ranks of a pipeline: each slot is as large as the largest stage needs."""
    s = state(run)
    parts: dict[str, float] = {"master weights": s.master, "moments": s.moments, "compute copy": s.compute}
    buffers = float(sum(b.bytes for b in exchange_buffers(run.cfg, run.mesh)))
    if run.pipeline is not None:
        slots = run.table().rings
        message = run.tokens * run.model.hidden_size * run.act
        parts |= {
            "gradients, float32": max(s.accumulated, s.gradients),
            "activations in flight": slots.saved * _largest(kept(run, x) for x in run.stages),
            "queue of weight gradients": slots.queue * _largest(cut(run, x) for x in run.stages),
            "rings between ranks": (slots.act + slots.grad + 2) * message,
        }
        buffers *= 2 if run.cfg.mesh.overlap else 1
    else:
        parts |= {
            "gradients": s.gradients + s.accumulated,
            "activations": kept(run, run.stages[0]),
        }
    parts |= {
        "gradients, scattered": s.scattered,
        "exchange buffers": buffers,
        "a layer's arrays": _working(run),
        "head, MTP modules": _end(run),
    }
    return parts


def least_bytes(run: Run) -> float:
    """A bound that `footprint` is not below, without the state's layout: what all micro-batches in flight keep, weights and
    float32 gradients."""
    c = counts(run)
    weights = c.linear + c.experts + c.tables + c.float32
    slots = run.table().rings.saved if run.pipeline else 1
    gradient = 4 if run.pipe > 1 or run.micros > 1 else min(4, run.act)
    return gradient * weights + slots * _largest(kept(run, x) for x in run.stages)

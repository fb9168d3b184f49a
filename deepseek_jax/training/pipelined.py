"""Gradients of an objective over a pipeline: the micro-batches of a step go through stages (report section 3.2.1).

`pipelined` is an alternative to `gradients.by_micro_batches`, for a mesh with the axis `pipe`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import Config
from deepseek_jax.model.layout import Layout
from deepseek_jax.model.transformer import Aux
from deepseek_jax.parallel.mesh import PIPE
from deepseek_jax.parallel.parts import over_devices
from deepseek_jax.parallel.pipeline.executor import Forwards, Steps
from deepseek_jax.parallel.pipeline.pipeline import pipeline_over
from deepseek_jax.parallel.pipeline.stage import Done, Gathered, MicroBatches, Stages
from deepseek_jax.parallel.pipeline.stages import Held
from deepseek_jax.precision import preset
from deepseek_jax.training.gradients import Gradients, Parts, loss_scale
from deepseek_jax.training.labels import Batch, Totals, inputs
from deepseek_jax.training.objectives import Objective, Outputs
from deepseek_jax.training.state import Hyper


def _micro_batches(
    batch: Batch, micro: int, t: int, worth: Callable[..., Any], there: Any = None
) -> MicroBatches:
    """Of one device's rows, `micro` of them. Only the first `there` are there, if it is given, the others all padding."""
    rows = len(batch["tokens"]) // micro

    def part(index: jax.Array) -> Mapping[str, jax.Array]:
        found = {name: lax.dynamic_slice_in_dim(x, index * rows, rows) for name, x in batch.items()}
        if there is not None:
            absent = jnp.broadcast_to(index >= there, found["tokens"].shape)
            found["padding"] = absent | found["padding"] if "padding" in found else absent
        return found

    return MicroBatches(part, lambda part: inputs(part, t), worth, rows, t)


def pipelined(cfg: Config, layout: Layout, objective: Objective) -> Gradients:
    """Of all micro-batches, through the stages that the ranks of `pipe` hold. `mesh.overlap`: the forward and the backward
    of a pair run layer beside layer. Balance losses must enter the objective linearly."""
    policy, pipeline = preset(cfg.precision), pipeline_over(cfg, dict(layout.mesh))
    assert pipeline is not None
    schedule, held = pipeline.training(), pipeline.held

    def gradients(
        params: Any, quantised: Any, batch: Batch, bias_le: jax.Array, total: Totals, hyper: Hyper
    ) -> tuple[Any, Parts]:
        def worth(part: Batch, h_btd: jax.Array, head_dv: jax.Array, aux: Aux) -> Any:
            return objective(Outputs(h_btd, head_dv, aux, layout.sequence), part, total, hyper)

        there = hyper.micro_batches
        if there is not None:  # of the accumulated ones, which the pipeline may divide
            there = there * (pipeline.micro // cfg.train.grad_accumulation)
        micro = _micro_batches(batch, pipeline.micro, cfg.data.seq_len, worth, there)
        run = Stages(cfg.model, layout, policy, held, Gathered(params, quantised, bias_le), micro)
        scale = loss_scale(policy, total)
        grads, done = Steps(schedule, run, scale, cfg.mesh.overlap).run()
        parts = Parts(done.metrics, _by_layer(cfg, held, run.rank, done))
        return jax.tree.map(lambda g: g / scale, grads), over_devices(parts, PIPE)

    return gradients


def _by_layer(cfg: Config, held: Held, rank: jax.Array, done: Done) -> jax.Array:
    """Loads of slots and MTP modules -> [layer, expert], zeros where this rank has nothing."""
    shape, n = cfg.model.balance_bias_shape, cfg.model.num_moe_layers
    slots = np.asarray(held.layers["moe_layers"])
    layer_s = jnp.asarray(np.where(slots < 0, shape[0], slots))[rank]
    counts_le = jnp.zeros(shape, jnp.int32).at[layer_s].add(done.counts_se, mode="drop")
    return counts_le.at[n:].add(done.mtp_counts_ke)


def evaluated(
    cfg: Config, layout: Layout, params: Any, quantised: Any, batch: Batch, bias_le: jax.Array, of: Any
) -> Any:
    """of(part, stream after the last layer) -> tree [rows, ...] of each of the device's sequences, which go through the
    pipeline one by one. All ranks get it."""
    pipeline = pipeline_over(cfg, dict(layout.mesh))
    assert pipeline is not None
    n = len(batch["tokens"])
    micro = _micro_batches(batch, n, cfg.data.seq_len, lambda *_: (jnp.zeros((), jnp.float32), {}))
    gathered = Gathered(params, quantised, bias_le)
    run = Stages(cfg.model, layout, preset(cfg.precision), pipeline.held, gathered, micro)
    return lax.psum(Forwards(pipeline.forwards(n), run, of).run(), PIPE)

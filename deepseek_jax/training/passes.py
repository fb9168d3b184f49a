"""Passes without a gradient over the mesh of a run: what a model says of each sequence of a batch.

Dims: b sequence, t token, v vocabulary, d hidden, l layer, e expert.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from deepseek_jax.balancing.plan import Plan
from deepseek_jax.config import Config
from deepseek_jax.model.layers import head_weight
from deepseek_jax.model.loss import weighted_nll
from deepseek_jax.model.sequence import Whole
from deepseek_jax.model.transformer import final_norm, forward, model_params
from deepseek_jax.model.weights import attach
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.exchange.order import after
from deepseek_jax.parallel.layout import layout_over
from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.parallel.pipeline.pipeline import pipeline_over
from deepseek_jax.parallel.slots import check_plan, in_slots
from deepseek_jax.parallel.zero import gather, held_specs
from deepseek_jax.precision import preset
from deepseek_jax.training.labels import Batch, inputs, targets
from deepseek_jax.training.pipelined import evaluated
from deepseek_jax.training.state import parameter_shares
from pallas_kernels.tiles import leave_sms

# (where a sequence is, head [d, v], rows of a batch, states [b, t, d] of this device's tokens) -> a tree of arrays
Of = Callable[[Whole, jax.Array, Batch, jax.Array], Any]


def make_pass(
    cfg: Config, mesh: Mesh | AbstractMesh, of: Of, per_token: bool, plan: Plan | None = None
) -> Callable[[Any, jax.Array, Batch], Any]:
    """The jitted pass: (params, balance_bias, batch) -> what `of` gives, of all sequences.

    of: of this device's rows, arrays [b, t] of its tokens if they are `per_token`, else [b], which are summed over the devices
    that share a sequence.
    plan: of the MoE layers, over the devices that share the experts; before each pass these go where it has them, copies and
    all, as they lie while serving (`parallel/slots.py`). Raises ValueError for what does not divide over the mesh, and for a plan
    over a pipeline.
    """
    model, t, policy = cfg.model, cfg.data.seq_len, preset(cfg.precision)
    shares = parameter_shares(cfg, mesh)
    layout = layout_over(cfg, mesh, anywhere=plan is not None).forward_only
    if plan is not None:
        check_plan(plan, model, cfg.mesh, mesh)

    pipeline = pipeline_over(cfg, mesh.shape)
    if pipeline is not None and plan is not None:
        raise ValueError(
            f"a plan of experts goes over one stage, and mesh.pipe={pipeline.ranks}: leave plan out"
        )
    layers = None if pipeline is None else pipeline.held.layers

    def of_rows(params, batch, h_btd):
        return of(layout.sequence, head_weight(params), batch, h_btd)

    def run(params, bias, batch):
        read = gather(params, shares, model_params(model), policy, model.dtype, layers)
        if pipeline is None:
            params = attach(*read, policy)
            if plan is not None:
                params = in_slots(params, plan)
                bias = after(
                    bias, params["moe_layers"]["ffn"]["experts"]
                )  # on CPUs, one exchange behind the other
            h_btd, _ = forward(params, model, inputs(batch, t), bias, layout, mtp=False)
            return of_rows(params, batch, h_btd)

        def after_the_layers(part, x_btd):
            return of_rows(read[0], part, final_norm(read[0], model, x_btd))

        return evaluated(cfg, layout, *read, batch, bias, after_the_layers)

    def local(params, bias, batch):
        found = run(params, bias, batch)
        return found if per_token else layout.sequence.total(found)

    rows = PartitionSpec(BATCH_AXES)
    over_mesh = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(held_specs(shares), PartitionSpec(), rows),
        out_specs=PartitionSpec(BATCH_AXES, "tensor") if per_token else rows,
        check_vma=False,
    )
    return jax.jit(
        leave_sms(cfg.mesh.comm_channels)(over_mesh),
        compiler_options=compiler_options(cfg.mesh, mesh, cfg.train.deterministic),
    )


def make_eval_step(
    cfg: Config, mesh: Mesh | AbstractMesh, plan: Plan | None = None
) -> Callable[[Any, jax.Array, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted evaluation: (params, balance_bias, batch) -> of each window, summed nats and number of labels that
    count, both float32 [b]. plan, errors: as for `make_pass`."""

    def nats(sequence, w_dv, batch, h_btd):
        labels, valid = map(sequence.own, targets(batch, cfg.data.seq_len, 0))

        def window(args):
            h, y, v = args
            weights = v.astype(jnp.float32)
            return weighted_nll(h, w_dv, y, weights, cfg.train.loss_chunk), weights.sum()

        return lax.map(window, (h_btd, labels, valid))

    return make_pass(cfg, mesh, nats, per_token=False, plan=plan)

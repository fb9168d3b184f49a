"""Gradients of an objective over one device's part of a batch, in micro-batches.

How they are computed is an argument of the step (`step.make_train_step`): `by_micro_batches` runs the whole model once
per micro-batch. Step and optimizer know nothing of the objective, nor the objective of micro-batches and FP8.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import Config
from deepseek_jax.model.layers import head_weight
from deepseek_jax.model.layout import Layout
from deepseek_jax.model.transformer import forward
from deepseek_jax.model.weights import adding, attach
from deepseek_jax.parallel.parts import plus
from deepseek_jax.precision import preset
from deepseek_jax.precision.policy import Policy
from deepseek_jax.training.labels import Batch, Totals, inputs
from deepseek_jax.training.objectives import Objective, Outputs, Scalars
from deepseek_jax.training.state import Hyper


class Parts(NamedTuple):
    """What adds up over micro-batches and devices: the objective's metrics, and tokens per MoE layer and expert
    (int32)."""

    metrics: Scalars
    counts_le: jax.Array


# (parameters, their quantised operands, batch, balance bias, totals, hyper) -> (float32 gradients, parts), this device's
Gradients = Callable[[Any, Any, Batch, jax.Array, Totals, Hyper], tuple[Any, Parts]]


def value_of(cfg: Config, layout: Layout, objective: Objective) -> Callable[..., tuple[jax.Array, Parts]]:
    """(parameters as the model reads them, batch, balance bias, totals, hyper) -> (the objective's scalar, parts).

    The batch holds whole sequences, of which a device takes its part if they are divided.
    """

    def value(
        params: Any, batch: Batch, bias_le: jax.Array, total: Totals, hyper: Hyper
    ) -> tuple[jax.Array, Parts]:
        h_btd, aux = forward(params, cfg.model, inputs(batch, cfg.data.seq_len), bias_le, layout)
        out = Outputs(h_btd, head_weight(params), aux, layout.sequence)
        scalar, metrics = objective(out, batch, total, hyper)
        return scalar, Parts(metrics, aux.expert_counts_le)

    return value


def loss_scale(policy: Policy | None, total: Totals) -> float:
    """Under an FP8 policy, a power of two near the global token count, on which the backward pass runs: gradients of a mean
    over a large batch would lie below the quantiser's smallest scale, and vanish."""
    return 1.0 if policy is None else 2.0 ** math.ceil(math.log2(total.room))


def by_micro_batches(cfg: Config, layout: Layout, objective: Objective) -> Gradients:
    """Of `grad_accumulation` micro-batches, one after the other; `hyper.micro_batches`: only the first so many of them,
    so that one program serves batches of all sizes.

    Under an FP8 policy the weights' quantised operands (`model.weights`) serve all micro-batches, and the backward pass
    runs on the scalar times `loss_scale`; weight gradients add to the sums where they lie, but for layers that multiply by
    a weight twice, for two halves of a batch. Of parameters that come in the compute dtype, a micro-batch's gradient is
    rounded to it, as products are; sums are float32.
    """
    policy, steps, value = (
        preset(cfg.precision),
        cfg.train.grad_accumulation,
        value_of(cfg, layout, objective),
    )

    def gradients(
        params: Any, quantised: Any, batch: Batch, bias_le: jax.Array, total: Totals, hyper: Hyper
    ) -> tuple[Any, Parts]:
        scale = loss_scale(policy, total)
        adds = steps > 1 and policy is not None and layout.moe_stack is None

        def scaled(params: Any, part: Batch) -> tuple[jax.Array, Parts]:
            scalar, parts = value(attach(params, quantised, policy, adds), part, bias_le, total, hyper)
            return scalar * scale, parts

        def grad(params: Any, part: Batch) -> tuple[Any, Parts]:
            grads, parts = jax.grad(scaled, has_aux=True)(params, part)
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), parts

        def unscaled(grads: Any) -> Any:
            return jax.tree.map(lambda g: g / scale, grads)

        if steps == 1:
            grads, parts = grad(params, batch)
            return unscaled(grads), parts
        added = adding(params, quantised, policy if adds else None)
        micro = {name: jnp.reshape(x, (steps, -1, *x.shape[1:])) for name, x in batch.items()}

        def body(i: Any, so_far: tuple[Any, Parts]) -> tuple[Any, Parts]:
            part = {name: lax.dynamic_index_in_dim(x, i, keepdims=False) for name, x in micro.items()}
            sums, done = so_far
            onto = jax.tree.map(lambda added, p, s: s if added else p, added, params, sums)
            grads, parts = grad(onto, part)
            sums = jax.tree.map(lambda added, s, g: g if added else s + g, added, sums, grads)
            return sums, plus(done, parts)

        shapes = jax.eval_shape(grad, params, {name: x[0] for name, x in micro.items()})
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        there = steps if hyper.micro_batches is None else hyper.micro_batches
        sums, parts = lax.fori_loop(0, there, body, zero)
        return unscaled(sums), parts

    return gradients

"""One training step: gradients over the mesh, guarded update, bias update (report sections 2.1.2, 4.2).

The forward and backward pass (`gradients.py`) runs inside `shard_map`, each device on its own sequences, or with a mesh
axis `tensor` on its part of each. Expert loads are summed as integers, so the bias update is exact whatever the number
of devices.

Dims: b sequence, t token, v vocabulary, d hidden, l layer, e expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from deepseek_jax.config import Config
from deepseek_jax.model.layout import Layout
from deepseek_jax.model.params import initialise
from deepseek_jax.model.router import update_bias
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.layout import layout_over
from deepseek_jax.parallel.mesh import BATCH_AXES, TOKEN_AXES, batch_shards, replicated
from deepseek_jax.parallel.parts import over_devices
from deepseek_jax.parallel.pipeline.pipeline import Pipeline, pipeline_over
from deepseek_jax.parallel.zero import gather, held_specs, scatter
from deepseek_jax.precision import preset
from deepseek_jax.training.frozen import frozen_leaves, trained
from deepseek_jax.training.gradients import Gradients, by_micro_batches
from deepseek_jax.training.labels import Batch, totals
from deepseek_jax.training.objectives import Objective, Scalars, pretraining
from deepseek_jax.training.optimizer import adamw, apply_if_finite, global_norm
from deepseek_jax.training.pipelined import pipelined
from deepseek_jax.training.state import Hyper, TrainState, parameter_shares, state_shardings
from pallas_kernels.tiles import leave_sms


class Metrics(NamedTuple):
    """Of one step: the objective's metrics by name; `finite` is False where the update was not applied."""

    objective: Scalars
    grad_norm: jax.Array
    counts_le: jax.Array
    finite: jax.Array
    bad_steps: jax.Array
    skipped: jax.Array

    @property
    def scalars(self) -> Scalars:
        """The objective's metrics, "loss" first, and the norm of the gradient: a step is skipped if one of them is not
        finite."""
        return {"loss": self.objective["loss"], **self.objective, "grad_norm": self.grad_norm}


def creation(cfg: Config, mesh: Mesh | AbstractMesh) -> Any:
    """The jitted function without arguments that makes the first state, each device its own part."""

    def create() -> TrainState:
        init_key, _ = jax.random.split(jax.random.key(cfg.train.seed))  # one of two: the seed's old meaning
        params = initialise(init_key, model_params(cfg.model), cfg.model.initializer_range)
        bias = jnp.zeros(cfg.model.balance_bias_shape, jnp.float32)
        return TrainState.create(params, adamw(cfg.optimizer).init(params), bias)

    # Runs once: unoptimised, it compiles in a third of the time.
    quickly = {"xla_backend_optimization_level": 0}
    return jax.jit(create, out_shardings=state_shardings(cfg, mesh), compiler_options=quickly)


def abstract_state(cfg: Config, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `jax.ShapeDtypeStruct`."""
    return creation(cfg, mesh).eval_shape()


def init_state(cfg: Config, mesh: Mesh | AbstractMesh) -> TrainState:
    """Random parameters (from train.seed), empty moments, zero bias; laid out by `state_shardings`."""
    return creation(cfg, mesh)()


def _sequences(cfg: Config, mesh: Mesh | AbstractMesh, pipeline: Pipeline | None, batch: Batch) -> int:
    """Global batch size. Raises ValueError if it does not divide over devices and micro-batches."""
    n, shards, micro = batch["tokens"].shape[0], batch_shards(mesh), cfg.train.grad_accumulation
    of_each = f"grad_accumulation={micro}"
    if pipeline is not None:
        micro, of_each = pipeline.micro, f"{pipeline.micro} micro-batches of the pipeline"
    if n % (shards * micro):
        raise ValueError(
            f"a batch of {n} sequences does not divide into {shards} device shards x {of_each}; change "
            "train.batch_size or mesh.*"
        )
    return n


def make_train_step(
    cfg: Config,
    mesh: Mesh | AbstractMesh,
    objective: Objective | None = None,
    gradients: Callable[[Config, Layout, Objective], Gradients] | None = None,
) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, Metrics]]:
    """The jitted step: (state, batch, hyper) -> (state, metrics). `state` is donated.

    Every mesh axis of the batch (data, node, local) is data parallel, and `tensor` divides sequences; experts are
    spread over node x local x tensor as `mesh.experts` says, and with `mesh.zero` parameters are gathered and gradients
    scattered once per step. Give it a state of `init_state`, or one laid out by `state_shardings`.

    objective: `objectives.pretraining(cfg)` by default. gradients: how its gradients are computed on each device, by
    default by `pipelined` over a mesh with several pipeline ranks, else by `by_micro_batches`.

    A metric or gradient that is not finite leaves parameters, moments and bias as they were and is counted.
    One program serves all batch sizes of a ramp: each device's rows are filled up to the full batch, and
    `hyper.micro_batches` says how many micro-batches of it are there. Raises ValueError for what does not divide over
    the mesh, and for too few micro-batches for the pipeline.
    """
    frozen = frozen_leaves(cfg.train.frozen, model_params(cfg.model))
    optimizer = adamw(cfg.optimizer, frozen=frozen)
    everywhere, shares = PartitionSpec(), parameter_shares(cfg, mesh)
    declared, policy = model_params(cfg.model), preset(cfg.precision)
    held, pipeline = held_specs(shares), pipeline_over(cfg, mesh.shape)
    if pipeline is not None and gradients is by_micro_batches:
        raise ValueError(
            f"by_micro_batches runs the whole model, and mesh.pipe={pipeline.ranks} divides it: leave gradients out"
        )
    gradients = gradients or (by_micro_batches if pipeline is None else pipelined)
    layers = None if pipeline is None else pipeline.held.layers
    grads_of = gradients(cfg, layout_over(cfg, mesh), objective or pretraining(cfg))

    def step(state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        n = _sequences(cfg, mesh, pipeline, batch)

        def local(params, bias, batch, hyper):
            read = gather(params, shares, declared, policy, cfg.model.dtype, layers)
            total = totals(cfg, batch, n, hyper.micro_batches, BATCH_AXES)
            grads, parts = grads_of(*read, batch, bias, total, hyper)
            return scatter(grads, shares, layers), over_devices(parts, TOKEN_AXES)

        grads, parts = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(held, everywhere, PartitionSpec(BATCH_AXES), everywhere),
            out_specs=(held, everywhere),
            check_vma=False,
        )(state.params, state.balance_bias, batch, hyper)
        norm = global_norm(trained(grads, frozen))
        finite = jnp.isfinite(jnp.stack([norm, *parts.metrics.values()])).all()
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, hyper.lr, norm, finite)
        params = optax.apply_updates(state.params, updates)
        bias = state.balance_bias
        if cfg.model.has_balance_bias and cfg.balance.mode == "loss_free":
            bias = update_bias(bias, parts.counts_le, hyper.gamma)
            bias = apply_if_finite(bias, state.balance_bias, finite)
        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            balance_bias=bias,
            bad_steps=bad_steps,
            skipped=skipped,
        )
        return state, Metrics(parts.metrics, norm, parts.counts_le, finite, bad_steps, skipped)

    return jax.jit(
        leave_sms(cfg.mesh.comm_channels)(step),
        donate_argnums=0,
        out_shardings=(state_shardings(cfg, mesh), replicated(mesh)),
        compiler_options=compiler_options(cfg.mesh, mesh, cfg.train.deterministic),
    )

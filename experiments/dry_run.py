"""`python -m experiments.train --dry_run` says what a run would be and checks what this machine can; it reads no data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh

from deepseek_jax.checkpoints.files import steps_in
from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import abstract_mesh, named_devices
from deepseek_jax.parallel.pipeline.pipeline import described
from deepseek_jax.training.preflight import StepProgram, abstract_batch, check_tokenizer, granularity
from deepseek_jax.training.schedules import Schedules
from deepseek_jax.training.start import Start
from deepseek_jax.training.step import make_train_step
from experiments.planning.memory import report as memory_report
from experiments.study.memory import state_memory


def model_line(cfg: Config) -> str:
    model = cfg.model
    return (
        f"model: {model.num_params():,} parameters, {model.num_active_params():,} active per token "
        f"(without the embedding), {model.num_mtp_params():,} more in MTP modules"
    )


def pre_training(cfg: Config, mesh: AbstractMesh) -> tuple[Any, Any]:
    """Returns the step of pre-training, and an abstract batch of it."""
    return make_train_step(cfg, mesh), abstract_batch(cfg, mesh)


def report(cfg: Config, step: Callable[[Any, AbstractMesh], tuple[Any, Any]] = pre_training) -> str:
    """Describes the run in several lines. step: of a config, its step and an abstract batch, as `pre_training`. Raises ValueError for what a run would refuse before it reads its data."""
    at_hand, named = jax.device_count(), named_devices(cfg.mesh)
    mesh = abstract_mesh(cfg.mesh, max(at_hand, named))
    size = granularity(cfg, mesh)
    schedules = Schedules.of_steps(cfg.optimizer, cfg.train, cfg.data.seq_len, size)
    check_tokenizer(cfg)
    if cfg.train.init_from and not steps_in(Path(cfg.train.out_dir) / "checkpoints"):
        Start(cfg, mesh)
    step_fn, batch = step(cfg, mesh)
    StepProgram(step_fn, cfg, mesh, schedules, batch)
    pipeline = described(cfg, mesh.shape)
    return "\n".join(
        (model_line(cfg), *_run(cfg, schedules, size), *cfg.remarks, *pipeline, *_memory(cfg, mesh, at_hand))
    )


def _run(cfg: Config, schedules: Schedules, size: int) -> tuple[str, ...]:
    first, steps, length = schedules.batch_size(0, size), schedules.num_steps(size), cfg.data.seq_len
    batch = f"{first} to {cfg.train.batch_size}" if first < cfg.train.batch_size else f"{first}"
    flops = cfg.model.flops_per_token(length) * schedules.total_tokens
    return (
        f"run: {steps:,} steps of {batch} x {length:,} tokens, {schedules.total_tokens:,} in all, {flops:.2e} FLOPs",
        f"output: {cfg.train.out_dir}; checkpoints every {cfg.train.checkpoint_every} steps",
    )


def _memory(cfg: Config, mesh: jax.sharding.AbstractMesh, at_hand: int) -> tuple[str, ...]:
    missing = "" if mesh.size <= at_hand else f", of which {at_hand} are at hand"
    return (
        f"memory on each of {mesh.size} device(s){missing}:",
        memory_report(state_memory(cfg, mesh)),
        "  without activations, buffers of the exchange and temporary copies",
    )

"""Checks before the first step: within seconds, they find what a config makes fail, before data are read."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from deepseek_jax import now
from deepseek_jax.checks import require
from deepseek_jax.config import Config
from deepseek_jax.data.bpe_training import MIN_VOCAB_SIZE
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.parallel.mesh import batch_sharding, batch_shards
from deepseek_jax.training.schedules import Schedules
from deepseek_jax.training.step import abstract_state

IN_BACKGROUND = "in the background"  # the name of a thread; `experiments.command_line` looks for it
_LOOK = 0.05  # seconds between two looks at what is compiled
_FIM_TOKENS = ("fim_begin", "fim_hole", "fim_end")


def check_tokenizer(cfg: Config) -> None:
    """Raises ValueError for a tokenizer that cannot be loaded or trained, or that the model or the data do not fit."""
    if cfg.data.tokenizer is None:
        least = f"data.vocab_size={cfg.data.vocab_size} must be at least {MIN_VOCAB_SIZE}: all bytes and special tokens"
        require(cfg.data.vocab_size >= MIN_VOCAB_SIZE, least)
        return
    tokenizer = Tokenizer.load(cfg.data.tokenizer)
    check_vocabulary(cfg, tokenizer)
    for name in ("eos", *(_FIM_TOKENS if cfg.data.fim_rate else ())):
        tokenizer.special_id(name)


def check_vocabulary(cfg: Config, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer has more ids than the model, or than the data's limit."""
    for name, size in (("model", cfg.model.vocab_size), ("data", cfg.data.vocab_size)):
        if tokenizer.vocab_size > size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, {name}.vocab_size is {size}: raise it"
            )


def abstract_batch(cfg: Config, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Shapes, dtypes and shardings of a whole batch, as `jax.ShapeDtypeStruct`."""
    shape, sharding = (cfg.train.batch_size, cfg.data.seq_len + 1), batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)
        for name, dtype in cfg.batch_arrays.items()
    }


def granularity(cfg: Config, mesh: Mesh | AbstractMesh) -> int:
    """Sequences of a micro-batch over all devices, of which a batch is a multiple. Raises ValueError if there is none."""
    size = batch_shards(mesh) * cfg.train.grad_accumulation
    if cfg.train.batch_size % size:
        raise ValueError(
            f"train.batch_size={cfg.train.batch_size} must be a multiple of {size}: {batch_shards(mesh)} devices of the "
            f"batch axes x train.grad_accumulation={cfg.train.grad_accumulation}"
        )
    return cfg.train.batch_size // cfg.train.grad_accumulation


def in_background(f: Callable[[], Any]) -> Future:
    """Runs `f` in a thread that does not keep the process alive."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(f())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=IN_BACKGROUND, daemon=True).start()
    return future


class StepProgram:
    """The step for a whole batch before it runs: traced at once, compiled in a thread.

    batch: of the shapes, dtypes and shardings of one. Raises ValueError for what cannot be computed.
    """

    def __init__(
        self, step_fn: Any, cfg: Config, mesh: Mesh | AbstractMesh, schedules: Schedules, batch: Any
    ):
        size = granularity(cfg, mesh)
        hyper = schedules.of_step(next(schedules.plan(size)), size)
        self._traced = step_fn.trace(abstract_state(cfg, mesh), batch, hyper)
        self._compiled: Future | None = None

    def compile(self) -> None:
        """Begins to compile, in a thread."""
        self._compiled = in_background(self._traced.lower().compile)
        if jax.process_count() > 1:  # which compile their programs in the same order
            self._compiled.result()

    def wait(self, stop: threading.Event) -> None:
        """Returns when the step is compiled, or `stop` is set."""
        if self._compiled is None:
            self.compile()
        assert self._compiled is not None
        with now.doing("compiling the training step"):
            while not self._compiled.done():
                if stop.wait(_LOOK):
                    return
            self._compiled.result()

"""A tiny saved checkpoint with a tokenizer, as a folder in the Hugging Face format or as a training run."""

import functools
from pathlib import Path

import jax
import numpy as np

from deepseek_jax import hf
from deepseek_jax.config import to_dict
from deepseek_jax.data import Tokenizer, train_tokenizer
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.optimizer import adamw
from deepseek_jax.training.state import TrainState
from tests.oracle.tiny import weights
from tests.tiny_run import tiny

RUN = tiny()
CFG = RUN.model
TEXT = "the latent cache keeps what the keys and the values share, and the keys keep the rest"


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 300)


def save_checkpoint(path: Path, seed: int = 0) -> Path:
    """Hugging Face format in float32, with tokenizer.json."""
    hf.save(path, CFG, *weights(CFG, seed), format="f32")
    tokenizer().save(path / "tokenizer.json")
    return path


def save_run(path: Path, seed: int = 0) -> Path:
    """A training run's output folder after steps 1 and 2; the averaged parameters are half of the others."""
    checkpointer = Checkpointer(path / "checkpoints")
    for step in (1, 2):
        params, bias = weights(CFG, seed + step)
        shapes = jax.eval_shape(adamw(RUN.optimizer).init, params)
        moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        state = TrainState.create(params, moments, bias)
        ema = {"params": jax.tree.map(lambda x: np.float32(0.5) * x, params), "updates": np.int32(step)}
        checkpointer.save(step, state, ema, {"config": to_dict(RUN), "data": {}, "tokens": step})
    checkpointer.close()
    tokenizer().save(path / "tokenizer.json")
    return path

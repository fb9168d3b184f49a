"""A checkpoint that writes: an expert whose answers are distilled, or a judge."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoints.files import locate
from deepseek_jax.checks import require
from deepseek_jax.config import MeshConfig
from deepseek_jax.inference.loading import load
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining.engine_rollouts import EngineRollouts, Parameters
from deepseek_jax.posttraining.rollouts import Rollouts
from deepseek_jax.serving.options import Options


@dataclasses.dataclass(frozen=True)
class Author:
    """Attributes:
    rollouts: draws its answers; close it at the end.
    tokenizer: with a chat template.
    positions: tokens of a prompt and its answer, at most.
    name: which checkpoint it is.
    """

    rollouts: Rollouts
    tokenizer: Any
    positions: int
    name: str


def author(path: str, step: int | None = None, ema: bool = False, rows: int = 64) -> Author:
    """The model in the folder of a run or of Hugging Face, on the first device.

    Args:
        step, ema: which checkpoint of a run, and whether its averaged parameters.
        rows: sequences that run at the same time.

    Raises ValueError: as `deepseek_jax.load`, and for a checkpoint without a chat template.
    """
    model = load(path, step=step, ema=ema)
    tokenizer, positions = model.tokenizer, model.config.max_position_embeddings
    require(
        tokenizer is not None and tokenizer.has_chat_template,
        f"{path} has no chat template: it cannot be asked. Put a chat_template.jinja beside its tokenizer.json",
    )
    assert tokenizer is not None
    over, options = MeshConfig(data=1), Options(rows=rows, waiting=1 << 30, steady=True)
    mesh = make_mesh(over, jax.local_devices()[:1])
    rollouts = EngineRollouts(model.config, mesh, over, options, tokenizer.vocab_size)
    rollouts.load(Parameters(model.params, model.balance_bias), 0)
    return Author(rollouts, tokenizer, positions, name_of(path, step, ema))


def name_of(path: str, step: int | None, ema: bool) -> str:
    """With the step that None means: a run that goes on is another author."""
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return path
    found = locate(folder, step)[0].name
    return f"{path}, step {found}{', averaged' if ema else ''}"

"""The prompts of a GRPO run, with the tokenizer that reads them and writes their answers."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.checks import require
from deepseek_jax.data.prompts import Prompt, PromptStream, load
from deepseek_jax.data.report import CorpusReport
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.posttraining.grpo_settings import GRPOConfig
from deepseek_jax.posttraining.task_files import in_files
from deepseek_jax.training.preflight import check_vocabulary


class Asked(NamedTuple):
    """In the place of a training run's data: `data.Data` has the same names."""

    tokenizer: Tokenizer
    train: PromptStream
    validation: list[Prompt]
    report: CorpusReport


def read_prompts(cfg: GRPOConfig) -> Asked:
    """Those of `cfg.prompts` that leave room for an answer. Raises ValueError for what cannot be read, or does not fit the model."""
    room = cfg.data.seq_len + 1 - cfg.rollouts.max_tokens
    require(cfg.data.tokenizer is not None, "data.tokenizer is not set, nor train.init_from, which has one")
    require(
        Path(str(cfg.data.tokenizer)).expanduser().exists(),
        f"{cfg.data.tokenizer} does not exist: fine-tune a model into it first (experiments.sft), or name other weights by "
        "train.init_from and their tokenizer by data.tokenizer",
    )
    tokenizer = Tokenizer.load(str(cfg.data.tokenizer))
    check_vocabulary(cfg, tokenizer)
    prompts = in_files(cfg.prompts, Path(cfg.data.cache_dir).expanduser(), "prompts.sources")
    found = load(dataclasses.replace(prompts, max_tokens=min(prompts.max_tokens, room)), tokenizer)
    return Asked(tokenizer, found.train, found.validation, found.report)

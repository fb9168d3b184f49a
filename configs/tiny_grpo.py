"""GRPO."""

import ml_collections

from configs import tiny
from configs.defaults import defaults
from deepseek_jax.posttraining.grpo_settings import GRPOConfig


def get_config() -> ml_collections.ConfigDict:
    config = defaults(GRPOConfig)
    config.model.update(tiny.get_config().model)
    config.data.update({"seq_len": 64, "vocab_size": 2048})
    config.optimizer.update(
        {"schedule": "constant", "peak_lr": 1e-4, "warmup_steps": 2, "weight_decay": 0.0, "gamma": 0.0}
    )
    config.train.detached_mtp = True
    config.prompts.sources = ("tasks:addition/2",)
    config.rollouts.update(
        {
            "max_tokens": 32,
            "samples": 8,
            "eval_prompts": 16,
            "eval_samples": 4,
            "rows": 64,
        }
    )
    config.train.update(
        {
            "steps": 6,
            "batch_size": 64,
            "eval_every": 3,
            "checkpoint_every": 3,
            "sample_tokens": 0,
            "out_dir": "runs/tiny_grpo",
            "init_from": "runs/tiny_sft",
        }
    )
    return config

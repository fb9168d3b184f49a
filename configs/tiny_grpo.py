"""The small model that learned to sort digits by `configs/tiny_sft.py` learns to get them right (section 5.2).

    make train
    python -m experiments.sft --config=configs/tiny_sft.py
    python -m experiments.grpo --config=configs/tiny_grpo.py

The loss is DeepSeek-V3.2's, on policy: each rollout of 128 answers, 16 to each of 8 questions, is for one step. An answer is worth
1 if it is right, else 0; a tenth of the questions are held out.

Hardware: 2 CPU cores, 2 GiB of memory.
"""

import ml_collections

from configs import tiny
from configs.defaults import defaults
from deepseek_jax.posttraining.grpo_settings import GRPOConfig


def get_config() -> ml_collections.ConfigDict:
    config = defaults(GRPOConfig)
    config.model.update(tiny.get_config().model)
    config.data.update({"seq_len": 64, "vocab_size": 2048})
    config.optimizer.update(
        {"schedule": "constant", "peak_lr": 1e-4, "warmup_steps": 0, "weight_decay": 0.0, "gamma": 0.0}
    )
    config.prompts.sources = ("tasks:sort_digits/4",)
    config.rollouts.update({"samples": 16, "max_tokens": 32, "eval_prompts": 64, "eval_samples": 16})
    config.train.update(
        {
            "init_from": "runs/tiny_sft",
            "out_dir": "runs/tiny_grpo",
            "steps": 120,
            "batch_size": 128,
            "eval_every": 30,
            "checkpoint_every": 30,
            "ema_decay": 0.9,
            "detached_mtp": True,
            "sample_tokens": 0,
        }
    )
    return config

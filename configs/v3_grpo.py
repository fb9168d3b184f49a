"""Reinforcement learning of DeepSeek-V3 by rules, with what DeepSeek-R1 says of its first stage (section 5.2, and R1's methods).

    python -m experiments.grpo --config=configs/v3_grpo.py --config.train.init_from=DIR --config.prompts.sources="rl/*.jsonl"

The report gives neither clip, weight of the KL divergence nor size of a group; R1 does: learning rate 3e-6, beta 0.001, clip 10,
16 answers of up to 32,768 tokens to each of 32 questions a step, at temperature 1; a rollout of 8,192 answers is for 16 steps, and
the reference is replaced every 400. The form of the loss is DeepSeek-V3.2's. Accuracy and format count the same. R1's first stage
has some 1,700 steps; these are whole rollouts.

Hardware: 512 GPUs of 80 GB, as configs/v3_sft.py. Not run: there is no expected reward. The step lowers; rollouts need what is not
there yet, an engine over several processes that takes other weights: now each process samples with the whole model on its
first device.
"""

import ml_collections

from configs import v3_sft
from configs.defaults import defaults
from deepseek_jax.posttraining.grpo_settings import GRPOConfig


def get_config() -> ml_collections.ConfigDict:
    config = defaults(GRPOConfig)
    tuned = v3_sft.get_config()
    for section in ("model", "data", "optimizer", "mesh", "train", "precision"):
        config[section] = tuned[section]
    config.prompts.update({"sources": ("rl/*.jsonl",), "max_tokens": 4096})
    config.data.seq_len = 36864
    config.optimizer.update({"schedule": "constant", "peak_lr": 3e-6})
    config.loss.update({"clip_low": 10.0, "clip_high": 10.0, "beta": 0.001})
    config.rewards = ("numeric", "format_tagged")
    config.rollouts.update(
        {
            "samples": 16,
            "updates": 16,
            "max_tokens": 32768,
            "temperature": 1.0,
            "reference_every": 400,
            "rows": 128,
            "buckets": 3,
        }
    )
    config.train.update(
        {
            "steps": 1696,
            "batch_size": 512,
            "grad_accumulation": 64,
            "detached_mtp": True,
            "eval_every": 80,
            "checkpoint_every": 80,
            "sample_tokens": 0,
            "init_from": "runs/v3_sft",
            "out_dir": "runs/v3_grpo",
        }
    )
    return config

"""The small model of `make train` learns to answer: seeded problems with their steps, a tenth held out (section 5.1).

    make train
    python -m experiments.sft --config=configs/tiny_sft.py

Hardware: 2 CPU cores, 2 GiB of memory. Run time: about 2 minutes.
"""

import ml_collections

from configs import tiny
from configs.defaults import defaults
from deepseek_jax.posttraining.sft import SFTConfig


def get_config() -> ml_collections.ConfigDict:
    config = defaults(SFTConfig)
    config.update(tiny.get_config())
    config.sft.sources = ("tasks:sort_digits/4=1",)
    config.data.update({"seq_len": 256, "fim_rate": 0.0})
    config.optimizer.update(
        {
            "schedule": "cosine",
            "peak_lr": 1e-3,
            "final_fraction": 0.1,
            "warmup_steps": 10,
            "gamma": 0.0,
            "mtp_lambda": 0.1,
        }
    )
    config.train.update(
        {
            "init_from": "runs/tiny",
            "out_dir": "runs/tiny_sft",
            "steps": 120,
            "eval_every": 60,
            "checkpoint_every": 60,
            "sample_tokens": 48,
        }
    )
    return config

"""The small model of `configs/tiny_grpo.py` writes training data: its right answers, the shortest to each problem.

    make train
    python -m experiments.sft --config=configs/tiny_sft.py
    python -m experiments.grpo --config=configs/tiny_grpo.py
    python -m experiments.distill --config=configs/tiny_distill.py
    python -m experiments.sft --config=configs/tiny_sft.py --config.sft.sources="runs/tiny_distill/sft.jsonl=1" \
        --config.sft.validation=tasks:sort_digits/4/1000 --config.train.out_dir=runs/tiny_student

The rows ask training questions alone, so that none is left to hold out: what to validate on is named.

Hardware: 2 CPU cores, 2 GiB of memory.
"""

import ml_collections

from configs.defaults import defaults
from deepseek_jax.posttraining.distill import DistillConfig


def get_config() -> ml_collections.ConfigDict:
    config = defaults(DistillConfig)
    config.expert = "runs/tiny_grpo"
    config.prompts.sources = ("tasks:sort_digits/4/1000=1",)
    config.update({"samples": 4, "max_tokens": 64, "system": "", "out_dir": "runs/tiny_distill"})
    config.select.update({"choose": "shortest", "repeated": 0.5})
    return config

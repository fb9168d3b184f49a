"""A GRPO run of the golden model, with rewards that its random answers differ in, to be killed and resumed:

python -m experiments.train --config=tests/golden/config.py
python -m experiments.kill_test --command=grpo --config=tests/golden/grpo_config.py --init_from=runs/golden --steps=60 --kills=10
python -m tests.posttraining.grpo_processes --init_from=runs/golden
"""

import ml_collections

from configs.defaults import defaults
from deepseek_jax.posttraining.grpo_settings import GRPOConfig
from tests.golden import config as golden


def get_config() -> ml_collections.ConfigDict:
    config = defaults(GRPOConfig)
    config.update(golden.get_config())
    config.data.update({"seq_len": 48, "fim_rate": 0.0})
    config.prompts.sources = ("tasks:addition/1/60=0.7", "tasks:recall/2=0.3")
    config.rewards = ("tests.posttraining.grpo_cases:even",)
    config.rollouts.update(
        {"samples": 4, "updates": 2, "max_tokens": 16, "rows": 8, "eval_prompts": 4, "eval_samples": 2}
    )
    config.rollouts.update({"reference_every": 8, "resample": 1, "top_p": 0.9})
    config.optimizer.update({"schedule": "constant", "warmup_steps": 5, "gamma": 0.0})
    config.train.update(
        {
            "steps": 8,
            "batch_size": 8,
            "eval_every": 4,
            "checkpoint_every": 4,
            "detached_mtp": True,
            "sample_tokens": 0,
            "init_from": "runs/golden",
            "out_dir": "runs/golden_grpo",
        }
    )
    return config

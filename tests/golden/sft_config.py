"""A fine-tuning run of the golden model on generated sums, to be killed and resumed:

python -m experiments.train --config=tests/golden/config.py
python -m experiments.kill_test --command=sft --config=tests/golden/sft_config.py --init_from=runs/golden --kills=10
"""

import ml_collections

from configs.defaults import defaults
from deepseek_jax.posttraining.sft import SFTConfig
from tests.golden import config as golden


def get_config() -> ml_collections.ConfigDict:
    config = defaults(SFTConfig)
    config.update(golden.get_config())
    config.sft.sources = ("tasks:addition/1=0.7", "tasks:recall/2=0.3")
    config.data.update({"seq_len": 64, "fim_rate": 0.0})
    config.optimizer.update({"schedule": "cosine", "warmup_steps": 5, "gamma": 0.0})
    config.train.update({"init_from": "runs/golden", "out_dir": "runs/golden_sft", "sample_tokens": 0})
    return config

"""The run whose loss curve is kept: 20 steps of a model with every part, on a snapshot of this project's sources.

python -m tests.golden.run             # compares
python -m tests.golden.run --write     # writes tests/golden/losses.json anew
"""

from pathlib import Path

import ml_collections

from configs.defaults import defaults
from tests.tiny_run import SECTIONS

HERE = Path(__file__).parent


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    for section, values in SECTIONS.items():
        config[section].update(values)
    config.data.update(
        {
            "source": str(HERE / "text" / "*.txt"),
            "tokenizer": str(HERE / "tokenizer.json"),
            "validation_fraction": 0.1,
            "seed": 0,
        }
    )
    config.train.update(
        {"eval_windows": 8, "eval_every": 10, "checkpoint_every": 5, "ema_every": 2, "out_dir": "runs/golden"}
    )
    return config

"""A tiny model's context from 256 to 1,024 to 2,048 tokens, one YaRN factor (report section 4.3).

    make train
    python -m experiments.extend --config=configs/tiny_extend.py

As in the report, the factor, 10, is a quarter more than 2,048 / 256, and a step has as many tokens in both phases. Grids show
which needles are found in how long haystacks by the model before, the same with YaRN and no training, after both phases,
and after as many steps on as many tokens in windows of 256. A model of 5M parameters that read 0.6M tokens of code cannot
recall what was said before: all four learn that first, at 256 tokens, in hay of three lines said in turn, and a quarter of the
texts of all runs asks for it.

Hardware: 2 CPU cores. Run time: 15 minutes on one busy core. Expected, at 128 to 2,048 tokens: the right number with a
probability that falls from 0.96 to 0.16 before, stays at 0.95 with YaRN alone, is 0.98 to 0.67 after both phases, and 0.9 to
0.2 after as much at 256 (experiments/LOG.md).
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.model.max_position_embeddings = 2560
    config.model.rope_scaling = {"factor": 10.0, "original_max_position_embeddings": 256}
    config.data.segments = True
    config.phases = {
        "seq_len": (1024, 2048),
        "batch_size": (8, 4),
        "steps": (20, 20),
        "lr": (1e-3, 1e-3),
    }
    config.recall = {"share": 0.25, "steps": 450, "steps_share": 0.85, "lr": 3e-3}
    config.control = True
    config.needle = {
        "lengths": (128, 256, 512, 1024, 2048),
        "samples": 6,
        "hay": ("# the grass is green", "# the sky is blue", "# the sun is yellow"),
    }
    config.train.update(
        {
            "batch_size": 4,
            "init_from": "runs/tiny",
            "out_dir": "runs/tiny_extend",
            "eval_every": 150,
            "checkpoint_every": 50,
            "sample_tokens": 0,
        }
    )
    return config

"""DeepSeek-V3's context extension as the report has it: 4K to 32K, then to 128K, one YaRN factor (section 4.3).

    python -m experiments.extend --config=configs/v3_extend.py --config.train.init_from=DIR --config.data.source="data/*.parquet"

1,000 steps of 1,920 sequences of 32K tokens, then 1,000 of 480 sequences of 128K: 62,914,560 tokens a step in both, as at
the end of pre-training. The learning rate stays at 7.3e-6, that of pre-training's end; so do the weight of the MTP loss
and the routers' bias. s = 40 from the first step on, a quarter more than 128K / 4K.

Hardware: 2,048 GPUs, as for pre-training (configs/v3_671b.py): a pipeline of 16 ranks, two replicas of each, experts over
64 devices, of which eight on a node share a sequence and its heads. A device then holds 4K tokens of a sequence of 32K, and
16K of one of 128K. The report says nothing of how it was spread. With 30 micro-batches of 128K DualPipe's schedules have
too few for 16 ranks: zero bubble takes any number. Not run: there is no expected loss. Without a GPU,

    python -m experiments.extend --config=configs/v3_extend.py --dry_run     # checks the config and traces both phases
"""

import ml_collections

from configs import v3_671b


def get_config() -> ml_collections.ConfigDict:
    config = v3_671b.get_config()
    config.model.max_position_embeddings = 163840
    config.model.rope_scaling = {"factor": 40.0, "original_max_position_embeddings": 4096}
    config.phases = {
        "seq_len": (32768, 131072),
        "batch_size": (1920, 480),
        "steps": (1000, 1000),
        "lr": (7.3e-6, 7.3e-6),
        "grad_accumulation": (120, 30),
    }
    config.mesh.update({"local": 1, "tensor": 8, "schedule": "zero_bubble", "overlap": False})
    config.train.update({"checkpoint_every": 100, "eval_every": 100, "out_dir": "runs/v3_extend"})
    return config

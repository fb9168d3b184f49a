"""DeepSeek-V3's context extension as the report has it: 4K to 32K, then to 128K, one YaRN factor (section 4.3).

    python -m experiments.extend --config=configs/v3_extend.py --config.train.init_from=DIR --config.data.source="data/*.parquet"

1,000 steps of 1,920 sequences of 32K tokens, then 1,000 of 480 sequences of 128K: 62,914,560 tokens a step in both, as at
the end of pre-training. The learning rate stays at 7.3e-6, that of pre-training's end; so do the weight of the MTP loss
and the routers' bias. s = 40 from the first step on, a quarter more than 128K / 4K.

Hardware: 2,048 GPUs, as for pre-training (configs/v3_671b.py): a pipeline of 16 ranks, two replicas of each, experts over
64 devices, of which the eight of a node share a sequence and its heads: each has 4K tokens of a sequence of 32K, and 16K of
one of 128K. How the report spread it is not known. A device has 30 sequences of 128K in a step, too few for both directions
of DualPipe over 16 ranks: 1F1B. `plan` predicts 47 GiB and 83 s a step, then 74 GiB, which is all that an 80 GB GPU has, and
225 s. Not run: there is no expected loss. Without a GPU,

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
    config.mesh.update({"local": 1, "tensor": 8, "schedule": "one_f_one_b", "overlap": False, "receive": 9.0})
    config.train.update(
        {"loss_chunk": 1024, "checkpoint_every": 100, "eval_every": 100, "out_dir": "runs/v3_extend"}
    )
    return config

"""DeepSeek-V3's supervised fine-tuning as the report has it: 1.5M instances, two epochs, 5e-6 to 1e-6 (section 5.1).

    python -m experiments.sft --config=configs/v3_sft.py --config.train.init_from=DIR --config.sft.sources="sft/*.jsonl"

A cosine from 5e-6 to 1e-6, several samples in a window that do not see each other. The report names no more; windows of 32K
tokens and 128 of them a step are DeepSeek-R1's. The routers' bias and the weight of the MTP loss stay as pre-training left them.
How many steps two epochs are, the data say: of 1.5M instances of 1,500 tokens, some 1,070.

Hardware: 512 GPUs of 80 GB. A pipeline of 8 ranks, experts over 64 devices, of which the eight of a node share a window and its
heads, so that each has 4K tokens at a time, as in pre-training. The 128 windows come in 16 micro-batches. `plan` predicts 66 GiB
and 26 s a step on H800, 8 hours in all. Not run: there is no expected loss. Without a GPU,

    python -m experiments.sft --config=configs/v3_sft.py --dry_run --config.train.init_from=DIR     # checks it and traces the step
    python -m experiments.plan step --config=configs/v3_sft.py
"""

import ml_collections

from configs import v3_671b
from configs.defaults import defaults
from deepseek_jax.posttraining.sft import SFTConfig


def get_config() -> ml_collections.ConfigDict:
    config = defaults(SFTConfig)
    config.update(v3_671b.get_config())
    config.model.max_position_embeddings = 163840
    config.model.rope_scaling = {"factor": 40.0, "original_max_position_embeddings": 4096}
    config.sft.update({"sources": ("sft/*.jsonl",), "epochs": 2.0})
    config.data.update({"seq_len": 32768, "fim_rate": 0.0})
    config.optimizer.update(
        {
            "schedule": "cosine",
            "peak_lr": 5e-6,
            "final_fraction": 0.2,
            "warmup_steps": 0,
            "gamma": 0.0,
            "mtp_lambda": 0.1,
        }
    )
    config.mesh.update({"pipe": 8, "data": 1, "node": 8, "local": 1, "tensor": 8, "overlap": False})
    config.mesh.update({"schedule": "one_f_one_b", "receive": 9.0})
    config.train.update(
        {
            "batch_size": 128,
            "grad_accumulation": 16,
            "loss_chunk": 1024,
            "eval_every": 100,
            "checkpoint_every": 100,
            "init_from": "runs/v3_extend/phase_2",
            "out_dir": "runs/v3_sft",
        }
    )
    return config

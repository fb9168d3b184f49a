"""DeepSeek-V3 as the report trains it: 671B parameters, 37B active, 14.8T tokens (sections 4.1 and 4.2).

    python -m experiments.train --config=configs/v3_671b.py --config.data.source="data/*.parquet"

The model is `ModelConfig`'s defaults: 4K tokens without YaRN, which the context extension adds afterwards. FP8 with
DeepSeek's recipe and recomputation, experts over 8 nodes of 8 GPUs in two hops, two halves of each micro-batch
overlapped, ZeRO-1. Batch 3072 -> 15360 sequences of 4096 tokens over the first 469B tokens, in micro-batches of 1024;
242,785 steps in all.

Hardware: the report used 2,048 H800 for 54 days of pre-training, 16 pipeline stages of 128. There is no pipeline
parallelism yet, so every GPU puts all layers together to compute, and no GPU of 80 GB holds that: `python -m
experiments.plan memory --config=configs/v3_671b.py --devices=512` says what each of 512 GPUs, 8 replicas of 8 nodes,
would need: 10 GiB between steps, and some 270 GiB in a step. Not run: there is no expected loss.
"""

import ml_collections

from configs.defaults import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    config.precision = "deepseek_fp8"
    config.model.dtype = "bfloat16"
    config.data.update({"source": "data/*.parquet", "vocab_size": 129280, "seq_len": 4096})
    config.mesh.update({"node": 8, "local": 8, "zero": True, "overlap": True, "receive": 10.0})
    config.train.update(
        {
            "steps": 242785,
            "batch_size": 15360,
            "grad_accumulation": 15,
            "remat": "deepseek",
            "loss_chunk": 4096,
            "eval_every": 500,
            "checkpoint_every": 500,
            "sample_tokens": 0,
            "out_dir": "runs/v3_671b",
        }
    )
    return config

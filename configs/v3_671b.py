"""DeepSeek-V3 as the report trains it: 671B parameters, 37B active, 14.8T tokens (sections 4.1 and 4.2).

    python -m experiments.train --config=configs/v3_671b.py --config.data.source="data/*.parquet"

The model is `ModelConfig`'s defaults: 4K tokens without YaRN, which the context extension adds afterwards. FP8 with
DeepSeek's recipe, ZeRO-1. Batch 3072 -> 15360 sequences of 4096 tokens over the first 469B tokens, each
device's in 24 to 120 micro-batches of one sequence; 242,785 steps in all. During the ramp the pipeline runs all 120, the
others empty.

Hardware: 2,048 GPUs; the report used as many H800, of 80 GB, for 54 days. A pipeline of 16 ranks, two replicas of each,
experts over 8 nodes of 8 GPUs in two hops. Not run: there is no expected loss. Two things differ from the report, so that
80 GB suffice: DualPipeV, which keeps one copy of the parameters where DualPipe keeps two, and layers that are recomputed
whole. XLA's compiler for H100s then allots 56.6 GiB, with the exchanges of all pairs of layers beside GEMMs
(experiments/LOG.md). On GPUs of 141 GB, --config.mesh.schedule=dualpipe is faster (93 GiB); the report's own recomputation is
--config.train.remat=deepseek. Without a GPU,

    python -m experiments.train --config=configs/v3_671b.py --dry_run      # checks the config and traces the step
    python -m experiments.plan step --config=configs/v3_671b.py            # memory, links, seconds of a step, price
    python -m experiments.plan step --config=configs/v3_671b.py --compile  # and what XLA's compiler for H100s says
"""

import ml_collections

from configs.defaults import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    config.precision = "deepseek_fp8"
    config.model.dtype = "bfloat16"
    config.data.update({"source": "data/*.parquet", "vocab_size": 129280, "seq_len": 4096})
    config.mesh.update(
        {"pipe": 16, "data": 2, "node": 8, "local": 8, "zero": True, "overlap": True, "receive": 10.0}
    )
    config.mesh.schedule = "dualpipe_v"
    config.train.update(
        {
            "steps": 242785,
            "batch_size": 15360,
            "grad_accumulation": 120,
            "remat": "full",
            "loss_chunk": 4096,
            "eval_every": 500,
            "checkpoint_every": 500,
            "sample_tokens": 0,
            "out_dir": "runs/v3_671b",
        }
    )
    return config

"""DeepSeek-V2-Lite: 15.7B parameters, 2.4B active, softmax gating, full-rank queries.

    python -m experiments.train --config=configs/v2_lite_16b.py --config.data.source="data/*.parquet"

Hardware: one node of 8 GPUs of 80 GB, or several. ZeRO-1: 15 GiB of state per GPU, 38 GiB in a step with gradients
and the compute copy, activations not counted (`python -m experiments.plan memory --config=configs/v2_lite_16b.py`).
Not run: there is no expected loss.
Figures of the published config.json of deepseek-ai/DeepSeek-V2-Lite, without YaRN, which came after pre-training.
Batch 4608 sequences, in micro-batches of 64.
"""

import ml_collections

from configs.defaults import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    config.model.update(
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "num_hidden_layers": 27,
            "first_k_dense_replace": 1,
            "intermediate_size": 10944,
            "num_attention_heads": 16,
            "q_lora_rank": None,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "num_nextn_predict_layers": 0,
            "dtype": "bfloat16",
        }
    )
    config.data.update(
        {
            "source": "data/*.parquet",
            "vocab_size": 102400,
            "seq_len": 4096,
        }
    )
    config.optimizer.update(
        {
            "peak_lr": 0.00042,
            "mid_lr": 4.2e-05,
            "final_lr": 1.4e-05,
            "batch_start": 0,
        }
    )
    config.mesh.update({"local": 8, "zero": True, "receive": 8.0})
    config.train.update(
        {
            "steps": 301000,
            "batch_size": 4608,
            "grad_accumulation": 72,
            "remat": "deepseek",
            "loss_chunk": 4096,
            "eval_every": 500,
            "checkpoint_every": 500,
            "sample_tokens": 0,
            "out_dir": "runs/v2_lite_16b",
        }
    )
    return config

"""DeepSeek-V2-Lite: 15.7B parameters, 2.4B active, softmax gating, full-rank queries.

    python -m experiments.train --config=configs/v2_lite_16b.py --config.data.source="data/*.parquet"

Hardware: one node of 8 GPUs of 80 GB, or several. ZeRO-1: 15 GiB of state per GPU, 38 GiB in a step with gradients
and the compute copy, activations not counted (`python -m experiments.plan memory --config=configs/v2_lite_16b.py`).
Not run: there is no expected loss. Batch 4608 sequences, in micro-batches of 64.
Figures of the published config.json of deepseek-ai/DeepSeek-V2-Lite, without YaRN, which came after pre-training: what
differs from `configs/v2_236b.py`.
"""

import ml_collections

from configs import v2_236b


def get_config() -> ml_collections.ConfigDict:
    config = v2_236b.get_config()
    config.model.update(
        {
            "hidden_size": 2048,
            "num_hidden_layers": 27,
            "intermediate_size": 10944,
            "num_attention_heads": 16,
            "q_lora_rank": None,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
        }
    )
    config.optimizer.update({"peak_lr": 4.2e-4, "mid_lr": 4.2e-5, "final_lr": 1.4e-5, "batch_start": 0})
    config.mesh.node = 1
    config.train.update(
        {"steps": 301000, "batch_size": 4608, "grad_accumulation": 72, "out_dir": "runs/v2_lite_16b"}
    )
    return config

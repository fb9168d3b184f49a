"""DeepSeek-V2: 236B parameters, 21B active, softmax gating with group-limited routing.

    python -m experiments.train --config=configs/v2_236b.py --config.data.source="data/*.parquet"

Hardware: nodes of 8 GPUs, 4 of them per replica of the experts. There is no pipeline parallelism yet, so every GPU
puts all layers together to compute: of 256 GPUs each keeps 7 GiB of state, but a step takes 159 GiB, activations not
counted (`python -m experiments.plan memory --config=configs/v2_236b.py --devices=256`): no GPU holds that.
Not run: there is no expected loss. Batch 2304 -> 9216 sequences in micro-batches of 256.
Figures of the published config.json of deepseek-ai/DeepSeek-V2, without YaRN, which came after pre-training.
"""

import ml_collections

from configs.defaults import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    config.model.update(
        {
            "vocab_size": 102400,
            "hidden_size": 5120,
            "num_hidden_layers": 60,
            "first_k_dense_replace": 1,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "topk_group": 3,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 16.0,
            "num_nextn_predict_layers": 0,
            "dtype": "bfloat16",
        }
    )
    config.data.update({"source": "data/*.parquet", "vocab_size": 102400, "seq_len": 4096})
    config.optimizer.update({"peak_lr": 2.4e-4, "mid_lr": 2.4e-5, "final_lr": 8e-6})
    config.optimizer.update({"batch_start": 2304, "batch_ramp_tokens": 225e9})
    config.mesh.update({"node": 4, "local": 8, "zero": True, "receive": 7.5})
    config.train.update(
        {
            "steps": 220000,
            "batch_size": 9216,
            "grad_accumulation": 36,
            "remat": "deepseek",
            "loss_chunk": 4096,
            "eval_every": 500,
            "checkpoint_every": 500,
            "sample_tokens": 0,
            "out_dir": "runs/v2_236b",
        }
    )
    return config

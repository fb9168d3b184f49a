"""DeepSeek-V3 as the report trains it: 671B parameters, 37B active, 14.8T tokens (sections 4.1 and 4.2).

    python -m experiments.train --config=configs/v3_671b.py --config.data.source="data/*.parquet"

Hardware: the report used 2,048 H800 for 54 days of pre-training, 16 pipeline stages of 128. There is no pipeline
parallelism yet, so every GPU puts all layers together to compute: of 512 GPUs, 8 replicas of 8 nodes, each keeps
10 GiB of state, but a step takes 119 GiB, activations not counted (`python -m experiments.plan memory
--config=configs/v3_671b.py --devices=512`). No GPU of 80 GB holds that. Not run: there is no expected loss.
Batch 3072 -> 15360 sequences of 4096 tokens over the first 469B tokens; 242,785 steps in all.
"""

import ml_collections

from configs.defaults import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    config.model.update(
        {
            "vocab_size": 129280,
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 3,
            "intermediate_size": 18432,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
            "rope_scaling": {
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "max_position_embeddings": 163840,
            "dtype": "bfloat16",
        }
    )
    config.data.update(
        {
            "source": "data/*.parquet",
            "vocab_size": 129280,
            "seq_len": 4096,
        }
    )
    config.mesh.update({"node": 8, "local": 8, "zero": True})
    config.train.update(
        {
            "steps": 242785,
            "batch_size": 15360,
            "remat": "deepseek",
            "loss_chunk": 4096,
            "eval_every": 500,
            "checkpoint_every": 500,
            "sample_tokens": 0,
            "out_dir": "runs/v3_671b",
        }
    )
    return config

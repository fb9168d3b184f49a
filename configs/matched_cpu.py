"""The small model at which this project and Hugging Face transformers are compared on CPU.

    python -m experiments.bench train
    python -m experiments.bench decode

Hardware: 2 CPU cores. Run time: some minutes for each command. Expected: the ratios in `experiments/LOG.md`.
It has about 7M parameters, 20 MFLOP per token, batch 8 x 256 in float32, and no MTP module: transformers has none.
"""

import ml_collections

from configs.defaults import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    config.model.update(
        {
            "vocab_size": 1024,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 1,
            "intermediate_size": 768,
            "num_attention_heads": 8,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "moe_intermediate_size": 128,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "num_nextn_predict_layers": 0,
            "initializer_range": 0.02,
        }
    )
    config.data.vocab_size = 1024
    config.optimizer.batch_start = 8
    config.train.update({"batch_size": 8, "loss_chunk": 512, "out_dir": "runs/matched_cpu"})
    return config

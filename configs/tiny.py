"""DeepSeek-V3 in small, trained on the Python standard library's sources in minutes on a laptop CPU.

    make train
    python -m experiments.train --config=configs/tiny.py

Hardware: 2 CPU cores, 2 GiB of memory. Run time: about 3 minutes.
Expected: validation loss about 4.3 nats per token, 1.95 bits per byte; a unigram model has 6.6 and 3.0.
5M parameters: 4 layers (1 dense), 16 routed experts of which 4 per token, 1 shared expert, 1 MTP module.
"""

import ml_collections

from configs.defaults import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    config.model.update(
        {
            "vocab_size": 2048,
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 1,
            "intermediate_size": 512,
            "num_attention_heads": 6,
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
            "max_position_embeddings": 1024,
            "initializer_range": 0.02,
        }
    )
    config.data.vocab_size = 2048
    config.optimizer.update(
        {"peak_lr": 3e-3, "mid_lr": 3e-4, "final_lr": 1e-4, "warmup_steps": 20, "gamma": 0.003}
    )
    config.train.update(
        {
            "steps": 280,
            "batch_size": 8,
            "eval_every": 70,
            "checkpoint_every": 70,
            "ema_decay": 0.9,
            "ema_every": 5,
        }
    )
    return config

"""A 1B-parameter model of the family for one GPU, on your own text.

    python -m experiments.train --config=configs/small_1b.py --config.data.source="data/*.jsonl.gz"

Hardware: one GPU with 80 GB. 1.06B parameters, 0.19B active per token. Not run: there is no expected loss.
Length: 20,000 steps of 256 x 2048 tokens, 10.5B tokens.
"""

import ml_collections

from configs.defaults import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    config.model.update(
        {
            "vocab_size": 32768,
            "hidden_size": 1024,
            "num_hidden_layers": 16,
            "first_k_dense_replace": 1,
            "intermediate_size": 2816,
            "num_attention_heads": 16,
            "q_lora_rank": 384,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "moe_intermediate_size": 320,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "dtype": "bfloat16",
        }
    )
    config.data.update({"source": "data/*.jsonl.gz", "vocab_size": 32768, "seq_len": 2048})
    config.optimizer.update({"peak_lr": 4e-4, "mid_lr": 4e-5, "final_lr": 1.3e-5, "batch_start": 64})
    config.train.update(
        {
            "steps": 20000,
            "batch_size": 256,
            "grad_accumulation": 16,
            "remat": "deepseek",
            "loss_chunk": 4096,
            "eval_every": 500,
            "checkpoint_every": 500,
            "out_dir": "runs/small_1b",
        }
    )
    return config

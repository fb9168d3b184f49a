"""The model of the FP8 study: small enough to train eighteen times on a laptop, wide enough for blocks of 128.

    python -m experiments.fp8_study

Hardware: 2 CPU cores. Run time: about 2 minutes per run in FP8. Expected: the tables in `experiments/LOG.md`.
It has 4M parameters: 3 layers (1 dense), 8 routed experts of which 2 per token, 1 shared expert; every contraction of
the attention and the FFNs has 1 to 4 blocks of 128.
The learning rate is a third of `configs/tiny.py`'s: at that one, runs that differ in rounding drift apart by 0.5%.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.model.update(
        {
            "hidden_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "q_lora_rank": 128,
            "kv_lora_rank": 128,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
        }
    )
    config.data.seq_len = 128
    config.optimizer.update({"peak_lr": 1e-3, "mid_lr": 1e-4, "final_lr": 3e-5})
    config.train.update(
        {"steps": 320, "eval_every": 320, "checkpoint_every": 320, "out_dir": "runs/fp8_study"}
    )
    return config

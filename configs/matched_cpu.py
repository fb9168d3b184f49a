"""The small model at which this project and Hugging Face transformers are compared on CPU.

    python -m experiments.bench train
    python -m experiments.bench decode

Hardware: 2 CPU cores. Run time: some minutes for each command. Expected: the ratios in `experiments/LOG.md`.
It has about 7M parameters, 20 MFLOP per token, batch 8 x 256 in float32, and no MTP module: transformers has none.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.model.update(
        {
            "vocab_size": 1024,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_attention_heads": 8,
            "num_nextn_predict_layers": 0,
            "max_position_embeddings": 4096,
        }
    )
    config.data.vocab_size = 1024
    config.optimizer.batch_start = 8
    config.train.update({"batch_size": 8, "loss_chunk": 512, "out_dir": "runs/matched_cpu"})
    return config

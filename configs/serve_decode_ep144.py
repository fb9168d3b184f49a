"""The unit that decodes online (DeepSeek's inference overview, February 2025): 18 nodes, attention and shared expert whole on each
of 144 devices, which have sequences of their own; experts over all of them, 2 of 288 on each, 32 of them redundant.

    python -m experiments.plan serve --config=configs/serve_decode_ep144.py --hardware=h800

Hardware: 144 GPUs of 80 GB, 8 to a node, each with a NIC of its own. DeepSeek measured 14.8k tokens per second and node:
1,850 per GPU, 84 to 92 sequences of 4,989 tokens in the mean.
"""

import ml_collections

from configs.serve_defaults import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    config.role = "decode"
    config.mesh.update({"node": 18, "local": 8})
    config.update({"redundant": 32, "rows": 96, "max_model_len": 131_072})
    return config

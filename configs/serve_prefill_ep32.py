"""The unit that reads prompts online (DeepSeek's inference overview, February 2025): 4 nodes, attention and shared expert whole on
each of 32 devices, which have prompts of their own; experts over all of them, 9 of 288 on each, 32 of them redundant.

    python -m experiments.plan serve --config=configs/serve_prefill_ep32.py --hardware=h800

Hardware: 32 GPUs of 80 GB, 8 to a node, each with a NIC of its own. DeepSeek measured 73.7k tokens per second and node of
input, 56.3% of them found in the cache: 4,030 computed per second and GPU.
"""

import ml_collections

from configs.serve_defaults import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults()
    config.role = "prefill"
    config.mesh.update({"node": 4, "local": 8, "receive": 10.0})
    config.update({"redundant": 32, "rows": 16, "chunk": 8192, "max_model_len": 131_072})
    return config

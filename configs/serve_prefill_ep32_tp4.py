"""The unit that reads prompts in the report (section 3.4.1): 4 nodes, attention over 4 devices that divide heads and tokens, 8
such groups side by side, experts over all 32 devices, 9 of 288 on each.

    python -m experiments.plan serve --config=configs/serve_prefill_ep32_tp4.py --hardware=h800

Hardware: 32 GPUs of 80 GB, 8 to a node, each with a NIC of its own. Every device keeps all of the attention's weights, of which
it multiplies a quarter. Expected, computed and not run: slower than `configs/serve_prefill_ep32.py`, which went online two
months later, by the latents and outputs that the four send one another, a tenth of a step.
"""

import ml_collections

from configs import serve_prefill_ep32


def get_config() -> ml_collections.ConfigDict:
    config = serve_prefill_ep32.get_config()
    config.mesh.update({"local": 2, "tensor": 4})
    return config

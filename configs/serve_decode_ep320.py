"""The unit that decodes in the report (section 3.4.2): 40 nodes, one expert on each of 320 devices. The shared expert is a ninth
routed one, which every token chooses: with 256 others it takes 257 slots, and 63 more are redundant, most of them copies of it.

    python -m experiments.plan serve --config=configs/serve_decode_ep320.py --hardware=h800

Hardware: 320 GPUs of 80 GB, 8 to a node, each with a NIC of its own. There the report divides heads over 4 devices, whose
latents are then four copies; here, as later online, each device attends to its own sequences. Not measured by anybody.
"""

import ml_collections

from configs import serve_decode_ep144


def get_config() -> ml_collections.ConfigDict:
    config = serve_decode_ep144.get_config()
    config.mesh.node = 40
    config.update({"redundant": 63, "shared_routed": True})
    return config

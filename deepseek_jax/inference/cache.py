"""The latent cache: kv_lora_rank + qk_rope_head_dim values per token and layer, nothing per head.

Dims: l layer, b batch, s slot, c latent, r rope.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.model.mla import LatentCache


def extend(cache: LatentCache, slots: int) -> LatentCache:
    """The same latents with room for `slots` slots in all."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))), cache)

"""The latent cache: kv_lora_rank + qk_rope_head_dim values per token and layer, nothing per head.

Dims: l layer, b batch, s slot, c latent, r rope.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.mla import LatentCache


def empty(cfg: ModelConfig, batch: int, slots: int) -> LatentCache:
    """A cache of zeros in the compute dtype: [l, b, slots, c] and [l, b, slots, r]."""
    shape = (cfg.num_hidden_layers, batch, slots)
    return LatentCache(
        jnp.zeros((*shape, cfg.kv_lora_rank), cfg.dtype), jnp.zeros((*shape, cfg.qk_rope_head_dim), cfg.dtype)
    )


def extend(cache: LatentCache, slots: int) -> LatentCache:
    """The same latents with room for `slots` slots in all."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))), cache)

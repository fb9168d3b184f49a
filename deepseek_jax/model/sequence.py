"""Where the tokens of a sequence are: all on this device, unless `parallel/tensor.py` divides them over several.

Most of the model looks at one token at a time and does not care. Attention, the tokens that an MTP module reads ahead
and the sequence-wise balance loss look further: they ask here.

Dims: b sequence, t token of the whole sequence, d hidden.
"""

from typing import Any

import jax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import mla
from deepseek_jax.model.layers import Params
from deepseek_jax.model.mla import CoreInputs, LatentCache, Rope


class Whole:
    """Whole sequences on one device: nothing is elsewhere."""

    @property
    def parts(self) -> int:
        """Over how many devices a sequence is divided, equally."""
        return 1

    def own(self, x_bt: jax.Array) -> jax.Array:
        """The tokens of this device, of an array [b, t, ...] of them all."""
        return x_bt

    def total(self, x: Any) -> Any:
        """Sum over the devices that share a sequence. Not to be differentiated."""
        return x

    def cached(self, latent: LatentCache) -> LatentCache:
        """Of the latents of `core_inputs`, the sequences that this device goes on to decode."""
        return latent

    def own_heads(self, params: Any, declared: Any) -> Any:
        """This device's heads of weights that it holds whole; `declared`: the tree of `Param` that they come from."""
        return params

    def last(self, h_btd: jax.Array) -> jax.Array:
        """States [b, d] of the last tokens of the sequences that this device goes on to decode; `h_btd` of its tokens."""
        return h_btd[:, -1]

    def core_inputs(
        self, p: Params, cfg: ModelConfig, x_btd: jax.Array, rope: Rope
    ) -> tuple[CoreInputs, LatentCache]:
        """`mla.core_inputs` of this device's heads for all tokens, from this device's tokens; `rope` of all."""
        return mla.core_inputs(p, cfg, x_btd, rope)

    def core_output(
        self, p: Params, cfg: ModelConfig, qkv: CoreInputs, segments_bt: jax.Array | None
    ) -> jax.Array:
        """`mla.core_output`, summed over all heads, for this device's tokens; `segments_bt` of all."""
        return mla.core_output(p, cfg, qkv, segments_bt)


WHOLE = Whole()

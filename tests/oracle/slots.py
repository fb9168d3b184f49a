"""Decoding over contiguous slots, a row of slots for each layer and sequence: what pages must equal."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.cache import LatentCache
from deepseek_jax.precision.sums import precision


def _write(x: jax.Array, new_btv: jax.Array, slot: jax.Array) -> jax.Array:
    """`new` into slots slot .. slot + t - 1 of `x` [b, s, v]; `slot` is [] or [b]."""

    def put(x: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(x, new, (slot, 0))

    slot_b = jnp.broadcast_to(slot, (len(x),))
    return jax.vmap(put)(x, new_btv.astype(x.dtype), slot_b)


class Apart(NamedTuple):
    """Each layer's latents for themselves: [l, b, s, ...]."""

    layers: LatentCache

    def read(self, i: Any) -> LatentCache:
        return LatentCache(*(x[i] for x in self.layers))

    def append(self, i: Any, new: LatentCache, slot: jax.Array) -> "Apart":
        put = (x.at[i].set(_write(x[i], n, slot)) for x, n in zip(self.layers, new, strict=True))
        return Apart(LatentCache(*put))

    @property
    def slots(self) -> int:
        return self.layers.c_bsc.shape[2]


class View(NamedTuple):
    """New tokens at slots slot .. slot + t - 1 of a contiguous cache.

    slot: int32 [] or [b]; mask_bts: which slots each token sees, itself included.
    """

    cache: Apart
    slot: jax.Array
    positions_bt: jax.Array
    mask_bts: jax.Array

    @property
    def slots(self) -> int:
        return self.cache.slots

    @property
    def counted_bt(self) -> None:
        """All new tokens count."""

    def append(self, i: Any, new: LatentCache) -> "View":
        """The view after the new tokens' latents of layer i [b, t, ...] are written."""
        return self._replace(cache=self.cache.append(i, new, self.slot))

    def attend(self, i: Any, q_bthc: jax.Array, q_bthr: jax.Array, scale: float) -> jax.Array:
        """Attention of the new tokens over the latents of layer i, for absorbed queries -> [b, h, t, c]. Scores and softmax
        are in float32."""
        cache, dtype, exact = self.cache.read(i), q_bthc.dtype, precision(q_bthc.dtype)
        score_as: Any = {"precision": exact, "preferred_element_type": jnp.float32}
        score = jnp.einsum("bthc,bsc->bhts", q_bthc, cache.c_bsc, **score_as)
        score += jnp.einsum("bthr,bsr->bhts", q_bthr, cache.r_bsr, **score_as)
        score = jnp.where(self.mask_bts[:, None], score * scale, -jnp.inf)
        prob = jax.nn.softmax(score, axis=-1).astype(dtype)
        # Heads before tokens: in the other order, XLA's product on CPU is a plain loop, six times as slow.
        return jnp.einsum("bhts,bsc->bhtc", prob, cache.c_bsc, precision=exact)


def view_after_padding(cache: Apart, slot: jax.Array, t: int, pad_b: jax.Array) -> View:
    """The view of t tokens from `slot` on ([] or [b]) of sequences whose first pad_b slots hold padding."""
    slot_bt = (
        jnp.reshape(slot, (-1, 1)) + jnp.arange(t)[None]
    )  # [1, t] where all sequences write the same slots
    slots = jnp.arange(cache.slots)[None, None]
    mask_bts = (slots <= slot_bt[..., None]) & (slots >= pad_b[:, None, None])
    return View(cache, slot, slot_bt - pad_b[:, None], mask_bts)


def empty(cfg: Any, rows: int, slots: int) -> Apart:
    """Of all layers of a model."""
    widths = (cfg.kv_lora_rank, cfg.qk_rope_head_dim)
    return Apart(
        LatentCache(*(jnp.zeros((cfg.num_hidden_layers, rows, slots, n), cfg.dtype) for n in widths))
    )

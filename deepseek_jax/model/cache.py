"""The latent cache, and the view of it through which decoding writes and reads (report section 2.1.1).

Of each token and layer the cache holds the normalised latent (kv_lora_rank) and the rotated shared key
(qk_rope_head_dim); nothing per head. A view knows where the new tokens of a pass go and what each of them sees. The model
asks it for `positions_bt`, and in layer i for `append(i, latents)` and `read(i)`; it does not know how tokens are stored.
`View` is over contiguous slots.

Dims: l layer, b sequence, t new token, s slot, c latent, r rotary key.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class LatentCache(NamedTuple):
    """c_bsc: normalised latents; r_bsr: rotated shared keys. A prefill stacks them on a leading layer axis."""

    c_bsc: jax.Array
    r_bsr: jax.Array


def _write(x: jax.Array, new_btv: jax.Array, slot: jax.Array, lead: tuple[Any, ...] = ()) -> jax.Array:
    """`new` into slots slot .. slot + t - 1 of `x` [lead dims, b, s, v] at the indices `lead`; `slot` is [] or [b]."""

    def put(x: jax.Array, new: jax.Array, *at: Any) -> jax.Array:
        return lax.dynamic_update_slice(x, new.reshape(*[1] * len(lead), *new.shape), (*lead, *at, 0))

    new_btv = new_btv.astype(x.dtype)
    if jnp.ndim(slot) == 0:
        return put(x, new_btv, 0, slot)
    return jax.vmap(put, in_axes=(len(lead), 0, 0), out_axes=len(lead))(x, new_btv, slot)


class Earlier(NamedTuple):
    """What a prefill in pieces has of the pieces before: latents [b, s, ...] of one layer, or [l, b, s, ...] of all.

    slot: int32 [], where the new tokens go; pad_b: how many slots hold padding, the first of each sequence.
    """

    cache: LatentCache
    slot: jax.Array
    pad_b: jax.Array

    def append(self, new: LatentCache) -> LatentCache:
        """One layer's latents, the new tokens' [b, t, ...] among them."""
        return LatentCache(*(_write(x, n, self.slot) for x, n in zip(self.cache, new, strict=True)))

    def without_padding(self, latents: LatentCache) -> LatentCache:
        """Each sequence's first token first, what is no token behind the last."""
        slot_bs = jnp.arange(latents.c_bsc.shape[1])[None] + self.pad_b[:, None]
        slot_bs = slot_bs % latents.c_bsc.shape[1]
        return jax.tree.map(lambda x: jnp.take_along_axis(x, slot_bs[..., None], axis=1), latents)

    @property
    def q_offset(self) -> jax.Array:
        """[b]: the first new token's position, negative in padding."""
        return self.slot - self.pad_b


class Apart(NamedTuple):
    """Each layer's latents in arrays of their own [b, s, ...]: layers are known when the program is traced."""

    layers: tuple[LatentCache, ...]

    def read(self, i: int) -> LatentCache:
        return self.layers[i]

    def append(self, i: int, new: LatentCache, slot: jax.Array) -> "Apart":
        one = LatentCache(*(_write(x, n, slot) for x, n in zip(self.layers[i], new, strict=True)))
        return Apart((*self.layers[:i], one, *self.layers[i + 1 :]))

    @property
    def slots(self) -> int:
        return self.layers[0].c_bsc.shape[1]


class Stacked(NamedTuple):
    """The latents of all layers in one array [l, b, s, ...]: layers are scanned."""

    latents: LatentCache

    def read(self, i: jax.Array) -> LatentCache:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), self.latents)

    def append(self, i: jax.Array, new: LatentCache, slot: jax.Array) -> "Stacked":
        parts = zip(self.latents, new, strict=True)
        return Stacked(LatentCache(*(_write(x, n, slot, (i,)) for x, n in parts)))

    @property
    def slots(self) -> int:
        return self.latents.c_bsc.shape[2]


Cache = Apart | Stacked


def with_room(latents: LatentCache, slots: int, dtype: Any) -> LatentCache:
    """Latents [..., s, v] with empty slots behind them, `slots` in all."""

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x.astype(dtype), (*[(0, 0)] * (x.ndim - 2), (0, slots - x.shape[-2]), (0, 0)))

    return LatentCache(*map(padded, latents))


def apart(latents: LatentCache) -> Apart:
    """Latents stacked on a leading layer axis, layer by layer."""
    return Apart(tuple(LatentCache(*one) for one in zip(*latents, strict=True)))


class View(NamedTuple):
    """New tokens at slots slot .. slot + t - 1 of a contiguous cache.

    slot: int32 [] or [b]; mask_bts: which slots each token sees, itself included.
    """

    cache: Cache
    slot: jax.Array
    positions_bt: jax.Array
    mask_bts: jax.Array

    def append(self, i: Any, new: LatentCache) -> "View":
        """The view after the new tokens' latents of layer i [b, t, ...] are written."""
        return self._replace(cache=self.cache.append(i, new, self.slot))

    def read(self, i: Any) -> tuple[LatentCache, jax.Array]:
        """What the attention core of layer i reads: latents [b, s, ...], and which of them each token sees [b, t, s]."""
        return self.cache.read(i), self.mask_bts


def view_after_padding(cache: Cache, slot: jax.Array, t: int, pad_b: jax.Array) -> View:
    """The view of t tokens from `slot` on ([] or [b]) of sequences whose first pad_b slots hold padding."""
    slot_bt = (
        jnp.reshape(slot, (-1, 1)) + jnp.arange(t)[None]
    )  # [1, t] where all sequences write the same slots
    slots = jnp.arange(cache.slots)[None, None]
    mask_bts = (slots <= slot_bt[..., None]) & (slots >= pad_b[:, None, None])
    return View(cache, slot, slot_bt - pad_b[:, None], mask_bts)

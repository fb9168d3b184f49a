"""The latent cache, and the view of it through which decoding writes and reads (report section 2.1.1).

Of each token and layer the cache holds the normalised latent (kv_lora_rank) and the rotated shared key
(qk_rope_head_dim); nothing per head. A view knows where the new tokens of a pass go and what each of them sees. The model
asks it for `positions_bt`, and in layer i for `append(i, latents)` and `attend(i, queries)`; it does not know how tokens
are stored. `PagedView` is over pages that sequences of any lengths share; their latents can also be read, to be expanded
(`over_pages.py`).

Dims: l layer, b sequence, t new token, s slot, c latent, r rotary key, p page, w width of a token in a page.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from pallas_kernels.mla_decode.ops import dequantize_cache, mla_decode, quantize_cache, token_bytes

PAGE = 64  # tokens


class LatentCache(NamedTuple):
    """c_bsc: normalised latents; r_bsr: rotated shared keys."""

    c_bsc: jax.Array
    r_bsr: jax.Array


def empty_pages(cfg: ModelConfig, layers: int, pages: int, fp8: bool = False, page: int = PAGE) -> jax.Array:
    """Pages of `page` tokens for each of `layers`, [l, p, page, w]: latent and rotary key in cfg.dtype or, of 656 instead of
    1,152 bytes in DeepSeek-V3, in the FP8 layout of `pallas_kernels.mla_decode`."""
    c, r = cfg.kv_lora_rank, cfg.qk_rope_head_dim
    width, dtype = (token_bytes(c, r), jnp.uint8) if fp8 else (c + r, cfg.dtype)
    return jnp.zeros((layers, pages, page, width), dtype)


class PagedView(NamedTuple):
    """The newest t tokens of sequences whose tokens lie in pages.

    pages_lpsw: of `empty_pages`. block_table: int32 [b, n], the pages of each sequence in order, the same in all layers;
    a sequence's pages are its own, and entries that it has no token for may be anything. lengths: int32 [b], tokens of each
    sequence in all, the new ones included; of one that is shorter than t, the last of the new tokens count, so 0 leaves a
    row out. positions_bt: where the new tokens stand, negative for one that does not count.
    """

    pages_lpsw: jax.Array
    block_table: jax.Array
    lengths: jax.Array
    positions_bt: jax.Array

    @property
    def counted_bt(self) -> jax.Array:
        """bool: the other tokens are written nowhere, go to no expert, and what comes out for them means nothing."""
        return self.positions_bt >= 0

    def over(self, pages_lpsw: jax.Array) -> "PagedView":
        """The same tokens, in pages that came of these."""
        return self._replace(pages_lpsw=pages_lpsw)

    def append(self, i: Any, new: LatentCache) -> "PagedView":
        """The view after the new tokens' latents of layer i [b, t, ...] are written."""
        _, pages, page, _ = self.pages_lpsw.shape
        x_btw = jnp.concatenate(new, axis=-1)
        fp8 = self.pages_lpsw.dtype == jnp.uint8
        x_btw = quantize_cache(x_btw, new.c_bsc.shape[-1]) if fp8 else x_btw.astype(self.pages_lpsw.dtype)
        n = jnp.clip(self.positions_bt // page, 0, self.block_table.shape[1] - 1)
        page_bt = jnp.take_along_axis(self.block_table, n, axis=1)
        there = (self.positions_bt >= 0) & (self.positions_bt < self.block_table.shape[1] * page)
        page_bt = jnp.where(there, page_bt, pages)  # behind the last one: dropped
        at_bt = self.positions_bt % page
        if page_bt.size == 1:  # XLA makes a branch of a single update, and copies all pages for it
            page_bt, at_bt = (jnp.concatenate([x, jnp.full_like(x, pages)]) for x in (page_bt, at_bt))
            x_btw = jnp.concatenate([x_btw, x_btw])
        put = self.pages_lpsw.at[i, page_bt, at_bt].set(x_btw, mode="drop")
        return self._replace(pages_lpsw=put)

    @property
    def slots(self) -> int:
        """Tokens that a sequence may have, by the table."""
        return self.block_table.shape[1] * self.pages_lpsw.shape[2]

    def read(self, i: Any, first: Any, pages: int, cfg: ModelConfig) -> LatentCache:
        """Latents of layer i [b, pages * page, ...] in cfg.dtype: those of each sequence's pages from `first` on, 0 where it
        has no token."""
        c, page = cfg.kv_lora_rank, self.pages_lpsw.shape[2]
        table_bn = jnp.pad(self.block_table, ((0, 0), (0, pages)))  # slices do not move at the end
        page_bp = lax.dynamic_slice_in_dim(table_bn, first, pages, axis=1)
        there_bs = first * page + jnp.arange(pages * page)[None] < self.lengths[:, None]
        x_bpsw = self.pages_lpsw[i, jnp.where(there_bs[:, ::page], page_bp, 0)]
        x_bsw = x_bpsw.reshape(*there_bs.shape, -1)
        fp8 = x_bsw.dtype == jnp.uint8
        x_bsw = dequantize_cache(x_bsw, c, cfg.dtype) if fp8 else x_bsw.astype(cfg.dtype)
        x_bsw = jnp.where(there_bs[..., None], x_bsw, 0)  # what lies beyond may be NaN
        return LatentCache(x_bsw[..., :c], x_bsw[..., c:])

    def attend(self, i: Any, q_bthc: jax.Array, q_bthr: jax.Array, scale: float) -> jax.Array:
        """Attention of the new tokens over the latents of layer i, for absorbed queries -> [b, h, t, c], by the op `mla_decode`. The pages of layer i are found in those of all layers."""
        layers, pages, *token = self.pages_lpsw.shape
        o_bthc, _ = mla_decode(
            jnp.concatenate([q_bthc, q_bthr], axis=-1),
            self.pages_lpsw.reshape(layers * pages, *token),
            self.block_table + i * pages,
            self.lengths,
            scale=scale,
            latent=q_bthc.shape[-1],
        )
        return jnp.swapaxes(o_bthc, 1, 2)


def paged_view(
    pages_lpsw: jax.Array, block_table: jax.Array, lengths: jax.Array, t: int, new_b: jax.Array | None = None
) -> PagedView:
    """The view of the newest t tokens of sequences that have `lengths` with them.

    new_b: int32 [b], how many of the t count, the last ones; None: all that there are.
    """
    new_bt = jnp.arange(t)[None]
    positions_bt = lengths[:, None] - t + new_bt
    if new_b is not None:
        positions_bt = jnp.where(new_bt >= t - new_b[:, None], positions_bt, -1)
    return PagedView(pages_lpsw, block_table, lengths, positions_bt)

"""Decodes over pages in XLA, a block of keys at a time, up to the end of the longest sequence.

Softmax is online: each block's sums are relative to the largest score so far. Probabilities are rounded to the dtype of the
queries before they meet the values, as on a tensor core.

Dims: b sequence, r row (query token, then head), p page, s key of a block, c latent, d = latent + rope.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import round_up
from pallas_kernels.mla_decode.fp8_cache import dequantize_cache

# Tables of up to so many slots take one block, without a loop. On a CPU larger blocks leave its caches: 32 rows of 80 numbers
# take 5.1 ms instead of 0.9 in blocks of 512 keys, of which they have 60.
BLOCK_KEYS = 128


class _Sums(NamedTuple):
    """Of the keys so far: largest score and sum of exponentials [b, r], weighted sum of latents [b, r, c]."""

    top_br: jax.Array
    total_br: jax.Array
    out_brc: jax.Array


def mla_decode(q, cache, block_table, lengths, *, scale: float, latent: int) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as `ops.mla_decode`."""
    b, t, h, d = q.shape
    q_brd = q.reshape(b, t * h, d)
    last_br = (
        lengths[:, None] - t + jnp.repeat(jnp.arange(t, dtype=jnp.int32), h)[None]
    )  # the last key that a row sees
    page = cache.shape[1]
    pages = min(max(1, BLOCK_KEYS // page), block_table.shape[1])
    table_bp = jnp.pad(
        block_table, ((0, 0), (0, round_up(block_table.shape[1], pages) - block_table.shape[1]))
    )

    def add_block(i: jax.Array, sums: _Sums) -> _Sums:
        first = i * pages
        some_bp = lax.dynamic_slice_in_dim(table_bp, first, pages, axis=1)
        in_use = (first + jnp.arange(pages)[None]) * page < lengths[:, None]
        rows = cache[jnp.where(in_use, some_bp, 0)].reshape(b, pages * page, -1)
        keys_bsd = dequantize_cache(rows, latent, q.dtype) if cache.dtype == jnp.uint8 else rows
        slot_bs = first * page + jnp.arange(pages * page)[None]
        keys_bsd = jnp.where(
            (slot_bs < lengths[:, None])[..., None], keys_bsd, 0
        )  # what lies beyond may be NaN
        return _add(sums, q_brd, keys_bsd, slot_bs[:, None] <= last_br[..., None], scale, latent)

    floats = {name: jnp.zeros((b, t * h), jnp.float32) for name in ("top_br", "total_br")}
    sums = _Sums(**floats, out_brc=jnp.zeros((b, t * h, latent), jnp.float32))
    sums = sums._replace(top_br=sums.top_br - jnp.inf)
    if table_bp.shape[1] == pages:
        sums = add_block(jnp.int32(0), sums)
    else:
        sums = lax.fori_loop(0, (jnp.max(lengths) + pages * page - 1) // (pages * page), add_block, sums)
    return _finish(sums, last_br, q)


def _add(sums: _Sums, q_brd, keys_bsd, seen_brs, scale: float, latent: int) -> _Sums:
    exact = lax.Precision.HIGHEST if q_brd.dtype == jnp.float32 else None
    score_brs = jnp.einsum(
        "brd,bsd->brs", q_brd, keys_bsd, precision=exact, preferred_element_type=jnp.float32
    )
    score_brs = jnp.where(seen_brs, score_brs * scale, -jnp.inf)
    top_br = jnp.maximum(sums.top_br, score_brs.max(-1))
    base_br = jnp.where(top_br == -jnp.inf, 0, top_br)  # nothing seen yet: exp(-inf - 0) is 0
    prob_brs = jnp.exp(score_brs - base_br[..., None])
    shrink_br = jnp.exp(sums.top_br - base_br)
    out_brc = jnp.einsum(
        "brs,bsc->brc",
        prob_brs.astype(q_brd.dtype),
        keys_bsd[..., :latent],
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    total_br = sums.total_br * shrink_br + prob_brs.sum(-1)
    return _Sums(top_br, total_br, sums.out_brc * shrink_br[..., None] + out_brc)


def _finish(sums: _Sums, last_br, q) -> tuple[jax.Array, jax.Array]:
    b, t, h, _ = q.shape
    sees = last_br >= 0
    out_brc = jnp.where(sees[..., None], sums.out_brc / jnp.where(sees, sums.total_br, 1)[..., None], 0)
    lse_br = jnp.where(sees, sums.top_br + jnp.log(sums.total_br), jnp.inf)
    return out_brc.reshape(b, t, h, -1).astype(q.dtype), lse_br.reshape(b, t, h).swapaxes(1, 2)

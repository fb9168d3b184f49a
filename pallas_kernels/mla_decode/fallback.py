"""Decodes over pages in XLA: on a CPU sequence by sequence, page by page; elsewhere a block of keys of all sequences at a time,
up to the end of the longest.

Softmax is online: each block's sums are relative to the largest score so far. Probabilities are rounded to the dtype of the
queries before they meet the values, as on a tensor core.

Dims: b sequence, r row (query token, then head), p page, s key of a block, c latent, d = latent + rope.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import round_up
from pallas_kernels.mla_decode.fp8_cache import dequantize_cache

BLOCK_KEYS = 512  # tables of up to so many slots take one block, without a loop


class _Sums(NamedTuple):
    """Of the keys so far: largest score and sum of exponentials [b, r], weighted sum of latents [b, r, c]."""

    top_br: jax.Array
    total_br: jax.Array
    out_brc: jax.Array


def mla_decode(q, cache, block_table, lengths, *, scale: float, latent: int) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as `ops.mla_decode`."""
    b, t, h, d = q.shape
    last_br = (
        lengths[:, None] - t + jnp.repeat(jnp.arange(t, dtype=jnp.int32), h)[None]
    )  # the last key that a row sees
    operands = q.reshape(b, t * h, d), cache, block_table, lengths, last_br
    static: dict[str, Any] = {"scale": scale, "latent": latent}
    sums = lax.platform_dependent(
        *operands,
        cpu=functools.partial(_row_by_row, **static),
        default=functools.partial(_in_blocks, **static),
    )
    return _finish(sums, last_br, q)


def _row_by_row(q_brd, cache, block_table, lengths, last_br, *, scale: float, latent: int) -> _Sums:
    """Each page is read once, into a core's cache: of a latent of 512, 32 sequences take a fifth of the time that blocks
    take, which are gathered, masked and multiplied one after the other; and no sequence waits for a longer one."""
    page, width = cache.shape[1], q_brd.shape[2]

    def of_one(xs: tuple[jax.Array, ...]) -> _Sums:
        q_rd, pages_n, length, last_r = xs
        q_1rd, last_1r = q_rd[None], last_r[None]

        def add_page(i: jax.Array, sums: _Sums) -> _Sums:
            keys_1sd = lax.dynamic_index_in_dim(cache, pages_n[i])
            if cache.dtype == jnp.uint8:
                keys_1sd = dequantize_cache(keys_1sd, latent, q_1rd.dtype)
            slot_s = i * page + jnp.arange(page)
            keys_1sd = jnp.where((slot_s < length)[None, :, None], keys_1sd, 0)  # what lies beyond may be NaN
            return _add(sums, q_1rd, keys_1sd, slot_s[None, None] <= last_1r[..., None], scale, width)

        pages = jnp.minimum((length + page - 1) // page, len(pages_n))
        sums = lax.fori_loop(0, pages, add_page, _nothing(1, q_1rd.shape[1], width))
        # Keys cut to their latents before the product would be one copy more.
        sums = sums._replace(out_brc=sums.out_brc[..., :latent])
        return jax.tree.map(lambda x: x[0], sums)

    return lax.map(of_one, (q_brd, block_table, lengths, last_br))


def _nothing(b: int, r: int, latent: int) -> _Sums:
    zero_br = jnp.zeros((b, r), jnp.float32)
    return _Sums(zero_br - jnp.inf, zero_br, jnp.zeros((b, r, latent), jnp.float32))


def _in_blocks(q_brd, cache, block_table, lengths, last_br, *, scale: float, latent: int) -> _Sums:
    """Blocks of BLOCK_KEYS keys of all sequences."""
    b, r, _ = q_brd.shape
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
        keys_bsd = dequantize_cache(rows, latent, q_brd.dtype) if cache.dtype == jnp.uint8 else rows
        slot_bs = first * page + jnp.arange(pages * page)[None]
        keys_bsd = jnp.where(
            (slot_bs < lengths[:, None])[..., None], keys_bsd, 0
        )  # what lies beyond may be NaN
        return _add(sums, q_brd, keys_bsd, slot_bs[:, None] <= last_br[..., None], scale, latent)

    sums = _nothing(b, r, latent)
    if table_bp.shape[1] == pages:
        return add_block(jnp.int32(0), sums)
    return lax.fori_loop(0, (jnp.max(lengths) + pages * page - 1) // (pages * page), add_block, sums)


def _add(sums: _Sums, q_brd, keys_bsd, seen_brs, scale: float, latent: int) -> _Sums:
    exact = lax.Precision.HIGHEST if q_brd.dtype == jnp.float32 else None
    score_brs = _scores(q_brd, keys_bsd, exact)
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


def _scores(q_brd, keys_bsd, exact) -> jax.Array:
    product = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    if q_brd.shape[1] >= keys_bsd.shape[1]:
        return product("brd,bsd->brs", q_brd, keys_bsd)
    # A CPU packs the right operand first: the smaller one. The barrier keeps XLA from turning the product round.
    return lax.optimization_barrier(product("bsd,brd->bsr", keys_bsd, q_brd)).swapaxes(1, 2)


def _finish(sums: _Sums, last_br, q) -> tuple[jax.Array, jax.Array]:
    b, t, h, _ = q.shape
    sees = last_br >= 0
    out_brc = jnp.where(sees[..., None], sums.out_brc / jnp.where(sees, sums.total_br, 1)[..., None], 0)
    lse_br = jnp.where(sees, sums.top_br + jnp.log(sums.total_br), jnp.inf)
    return out_brc.reshape(b, t, h, -1).astype(q.dtype), lse_br.reshape(b, t, h).swapaxes(1, 2)

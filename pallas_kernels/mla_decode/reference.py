"""Defines what decoding of MLA over pages means, in float32, one sequence after the other.

Dims: b sequence, t query token, h head, s key slot of a sequence, c latent, d = latent + rope.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_decode.fp8_cache import dequantize_cache


def mla_decode(q, cache, block_table, lengths, *, scale: float, latent: int) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as `ops.mla_decode`."""
    num_queries = q.shape[1]

    def of_one_sequence(operands):
        q_thd, pages, length = operands
        slot = jnp.arange(len(pages) * cache.shape[1])
        exists = slot < length
        in_use = exists.reshape(len(pages), -1).any(1)
        rows = cache[jnp.where(in_use, pages, 0)].reshape(len(slot), -1)
        keys_sd = dequantize_cache(rows, latent) if cache.dtype == jnp.uint8 else rows.astype(jnp.float32)
        keys_sd = jnp.where(exists[:, None], keys_sd, 0)  # what lies beyond the end may be NaN
        seen_ts = slot[None] <= (length - num_queries + jnp.arange(num_queries))[:, None]
        return _attention(q_thd.astype(jnp.float32), keys_sd, seen_ts, scale, latent)

    out_bthc, lse_bht = lax.map(of_one_sequence, (q, block_table, lengths))
    return out_bthc.astype(q.dtype), lse_bht


def _attention(q_thd, keys_sd, seen_ts, scale, latent):
    """Softmax attention whose values are the first `latent` columns of the keys; a query that sees none gets 0, +inf."""
    score_hts = jnp.einsum("thd,sd->hts", q_thd, keys_sd, precision="highest") * scale
    score_hts = jnp.where(seen_ts[None], score_hts, -jnp.inf)
    lse_ht = jax.nn.logsumexp(score_hts, axis=-1)
    lse_ht = jnp.where(seen_ts.any(1)[None], lse_ht, jnp.inf)
    prob_hts = jnp.exp(score_hts - lse_ht[..., None])
    return jnp.einsum("hts,sc->thc", prob_hts, keys_sd[:, :latent], precision="highest"), lse_ht

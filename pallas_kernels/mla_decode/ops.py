"""Public functions of decoding over a paged latent cache.

DeepSeek-V3 report, section 2.1.1, in the form with absorbed up-projections: all heads share one key per token, the
normalised latent and the rotary key, and the latent is its value.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch
from pallas_kernels.mla_decode import fallback, kernel, reference
from pallas_kernels.mla_decode.fp8_cache import dequantize_cache, quantize_cache, token_bytes

__all__ = ["dequantize_cache", "mla_decode", "quantize_cache", "token_bytes"]


def mla_decode(
    q: jax.Array,
    cache: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    latent: int = 512,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of the newest tokens of each sequence over its pages.

    Args:
      q: [B, T, H, latent + rope] bfloat16 or float32, the absorbed queries of the last T tokens of each sequence.
      cache: [pages, page, latent + rope] of q's dtype, or uint8 [pages, page, token_bytes] of `quantize_cache`. The kernel
        takes pages of a multiple of 64 tokens.
      block_table: [B, max_pages] int32, the pages of each sequence in order; entries beyond its length are not read.
      lengths: [B] int32, tokens of each sequence in all, the T new ones included, at most max_pages * page. Query t sees
        the first lengths - T + t + 1. What pages hold beyond the length may be anything.
      scale: of the scores. That of the model is not (latent + rope)**-0.5.
      latent: width of the latent.
      implementation: None (by platform), "mosaic", "xla" or "reference".

    Returns:
      out [B, T, H, latent] in q's dtype and the log-sum-exp of the scores, float32 [B, H, T], natural logarithm. A query
      that sees nothing gets 0 and +inf.

    Raises:
      ValueError: operands that do not belong together, or "mosaic" asked for what the kernel does not support.
    """
    _check(q, cache, block_table, lengths, latent)
    static: dict[str, Any] = {"scale": float(scale), "latent": latent}
    return dispatch(
        "mla_decode",
        implementation,
        q,
        cache,
        block_table,
        lengths,
        mosaic=functools.partial(kernel.mla_decode, **static),
        xla=functools.partial(fallback.mla_decode, **static),
        reference=functools.partial(reference.mla_decode, **static),
        unsupported=kernel.unsupported(q, cache, latent),
    )


def _check(q, cache, block_table, lengths, latent: int) -> None:
    if q.ndim != 4 or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"mla_decode: q is {q.dtype}{list(q.shape)}; expected bfloat16 or float32 [B, T, H, latent + rope]"
        )
    b, t, h, d = q.shape
    if not 0 < latent <= d:
        raise ValueError(f"mla_decode: latent={latent} with queries of {d}; it must be 1 to {d}")
    fp8 = cache.dtype == jnp.uint8
    width = token_bytes(latent, d - latent) if fp8 else d
    if cache.ndim != 3 or cache.shape[-1] != width or not (fp8 or cache.dtype == q.dtype):
        raise ValueError(
            f"mla_decode: cache is {cache.dtype}{list(cache.shape)}; for {q.dtype} queries of latent {latent} + rope "
            f"{d - latent} expected {q.dtype}[pages, page, {d}] or uint8[pages, page, {token_bytes(latent, d - latent)}]"
        )
    if 0 in (b, t, h, cache.shape[0], cache.shape[1]):
        raise ValueError(f"mla_decode: q {list(q.shape)} or cache {list(cache.shape)} is empty")
    table = block_table.dtype == jnp.int32 and block_table.ndim == 2 and block_table.shape[0] == b
    if not table or block_table.shape[1] == 0 or lengths.dtype != jnp.int32 or lengths.shape != (b,):
        raise ValueError(
            f"mla_decode: block_table is {block_table.dtype}{list(block_table.shape)} and lengths "
            f"{lengths.dtype}{list(lengths.shape)}; expected int32[{b}, max_pages] and int32[{b}]"
        )

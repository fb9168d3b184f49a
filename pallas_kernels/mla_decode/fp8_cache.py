"""The FP8 latent cache: what the bytes of a token are, and how they are written and read.

    latent E4M3 values | one float32 scale per 128 of them | rope BF16 values      512 + 16 + 128 = 656 bytes

as DeepSeek-V3.2 and FlashMLA lay it out. A scale is a power of two, the smallest s with amax / s <= 448, and at least 1e-4
before it is rounded up; so a latent times its scale is exact in BF16. The rotary key is not quantised.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import BLOCK, ROW_TILE, cdiv, merge_blocks, split_blocks
from pallas_kernels.quantize.fallback import ceil_to_power_of_two
from pallas_kernels.quantize.reference import E4M3_MAX, divide

SCALE_FLOOR = 1e-4


def token_bytes(latent: int, rope: int) -> int:
    """Returns the bytes of one token."""
    return latent + 4 * cdiv(latent, BLOCK) + 2 * rope


def quantize_cache(x: jax.Array, latent: int = 512) -> jax.Array:
    """Writes latents and rotary keys [..., latent + rope], of any float dtype, as bytes uint8 [..., token_bytes].

    A block of latents with an infinity or a NaN reads back as NaN.
    """
    tiles = split_blocks(x[..., None, :latent].astype(jnp.float32), ROW_TILE)
    amax = jnp.max(jnp.abs(tiles), axis=(-3, -1))
    scale = ceil_to_power_of_two(jnp.maximum(divide(amax, jnp.float32(E4M3_MAX)), SCALE_FLOOR))
    q = divide(tiles, scale[..., :, None, :, None]).astype(jnp.float8_e4m3fn)
    parts = merge_blocks(q, (1, latent)), scale, x[..., None, latent:].astype(jnp.bfloat16)
    return jnp.concatenate([_bytes(part[..., 0, :]) for part in parts], axis=-1)


def dequantize_cache(cache: jax.Array, latent: int = 512, dtype=jnp.float32) -> jax.Array:
    """Reads what `quantize_cache` wrote: [..., latent + rope] in `dtype`; BF16 holds it exactly."""
    blocks = cdiv(latent, BLOCK)
    q, scale, rope = jnp.split(cache, [latent, latent + 4 * blocks], axis=-1)
    q = lax.bitcast_convert_type(q, jnp.float8_e4m3fn).astype(dtype)
    scale = lax.bitcast_convert_type(scale.reshape(*scale.shape[:-1], blocks, 4), jnp.float32)
    rope = lax.bitcast_convert_type(rope.reshape(*rope.shape[:-1], -1, 2), jnp.bfloat16)
    tiles = split_blocks(q[..., None, :], ROW_TILE) * scale[..., None, None, :, None].astype(dtype)
    return jnp.concatenate([merge_blocks(tiles, (1, latent))[..., 0, :], rope.astype(dtype)], axis=-1)


def _bytes(x: jax.Array) -> jax.Array:
    """The bytes of [..., n] values, in the order of memory."""
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)

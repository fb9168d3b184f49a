"""Quantises in XLA, on any device and with any leading dims, bit for bit as `reference.py` does."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import Block, merge_blocks, split_blocks
from pallas_kernels.quantize.reference import divide, scale_of_amax


def ceil_to_power_of_two(s: jax.Array) -> jax.Array:
    """Rounds a positive normal float32 up to a power of two, on its bits: `ceil(log2 s)` in floating point can miss.

    Adding all mantissa bits carries into the exponent unless the mantissa is zero. NaN and infinity stay.
    """
    bits = lax.bitcast_convert_type(s, jnp.uint32)
    power = lax.bitcast_convert_type((bits + jnp.uint32(0x7FFFFF)) & jnp.uint32(0x7F800000), jnp.float32)
    return jnp.where(s < jnp.inf, power, s)


def scale_from_amax(amax: jax.Array, scale: str) -> jax.Array:
    """Returns the scale of a block whose largest magnitude is `amax`."""
    s = scale_of_amax(amax)
    return ceil_to_power_of_two(s) if scale == "ue8m0" else s


def quantize(x: jax.Array, block: Block, scale: str) -> tuple[jax.Array, jax.Array]:
    """x [..., M, K] -> q e4m3 [..., M, K], s float32 [..., ceil(M/bm), ceil(K/bk)]."""
    tiles = split_blocks(x.astype(jnp.float32), block)
    s = scale_from_amax(jnp.max(jnp.abs(tiles), axis=(-3, -1)), scale)
    q = divide(tiles, s[..., :, None, :, None]).astype(jnp.float8_e4m3fn)
    return merge_blocks(q, x.shape), s


def dequantize(q: jax.Array, s: jax.Array, block: Block) -> jax.Array:
    tiles = split_blocks(q.astype(jnp.float32), block)
    return merge_blocks(tiles * s[..., :, None, :, None], q.shape)

"""E5M6, in which the attention output is kept for the backward pass (report section 3.3.3).

The tensor feeds the backward pass of both the output projection and the attention core, so E4M3 would be too coarse.
12 bits: sign, 5 exponent bits, 6 mantissa bits; power-of-two scales per 1x128 tile, so that scaling is exact. The bit
layout is not published; here it is IEEE half precision without the last 4 mantissa bits, subnormals flushed to zero,
two numbers packed into three bytes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import BLOCK, merge_blocks, num_blocks, split_blocks
from pallas_kernels.quantize.fallback import ceil_to_power_of_two

MAX = 65024.0  # (2 - 2^-6) * 2^15
_TILE = (1, BLOCK)
_FLOOR = 2.0**-100  # of a tile's largest magnitude, so that a tile of zeros has a scale


class E5M6(NamedTuple):
    """bytes uint8 [..., rows, 3 * ceil(columns / 2)], scale float32 [..., rows, ceil(columns / 128)]."""

    bytes: jax.Array
    scale: jax.Array


def encode(x: jax.Array) -> E5M6:
    """x [..., rows, columns] -> E5M6, rounded to nearest even. A non-finite element spoils its tile (NaN)."""
    tiles = split_blocks(x.astype(jnp.float32), _TILE)
    amax = jnp.maximum(jnp.max(jnp.abs(tiles), axis=(-3, -1)), _FLOOR)
    # Half a step below MAX would round up to infinity: leave a factor of two.
    scale = ceil_to_power_of_two(amax / (MAX / 2))
    y = merge_blocks(tiles / scale[..., :, None, :, None], x.shape)
    half = lax.reduce_precision(y, 5, 6).astype(jnp.float16)
    bits = lax.bitcast_convert_type(half, jnp.uint16) >> 4
    bits = jnp.pad(bits, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])
    low, high = bits[..., 0::2], bits[..., 1::2]
    packed = (low & 0xFF, (low >> 8) | ((high & 0xF) << 4), high >> 4)
    return E5M6(jnp.concatenate(packed, axis=-1).astype(jnp.uint8), scale)


def decode(x: E5M6, columns: int, dtype=jnp.float32) -> jax.Array:
    """The values [..., rows, columns] in `dtype`; exact in bfloat16 and wider."""
    first, middle, last = (part.astype(jnp.uint16) for part in jnp.split(x.bytes, 3, axis=-1))
    low, high = first | ((middle & 0xF) << 8), (middle >> 4) | (last << 4)
    bits = jnp.stack([low, high], axis=-1).reshape(*first.shape[:-1], -1)[..., :columns]
    y = lax.bitcast_convert_type(bits << 4, jnp.float16).astype(jnp.float32)
    assert x.scale.shape == num_blocks(y.shape, _TILE)
    tiles = split_blocks(y, _TILE)
    return merge_blocks(tiles * x.scale[..., :, None, :, None], y.shape).astype(dtype)

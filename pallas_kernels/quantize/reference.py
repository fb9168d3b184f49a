"""Defines what quantisation means, in float32 arithmetic and without the float8 conversion of the compiler.

DeepSeek-V3 report, section 3.3.2: all tensors are E4M3 (3 mantissa bits, exponents -6..8, largest value 448, no
infinity), each block has one scale from its own largest magnitude (no delayed scaling).

    amax = max(|x| over the block, 1e-4)      the floor is on amax, so an all-zero block has scale 1e-4/448
    s    = amax / 448                         "ue8m0": rounded up to a power of two
    q    = e4m3(x / s)                        a division, as in DeepSeek's inference code; DeepGEMM multiplies by 1 / s
                                              and DeepEP by 448 / amax, which differ in the last bit
A non-finite x is NaN once dequantised, and an infinity takes its whole block along: nothing is clipped silently.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Block, expand_scale, merge_blocks, split_blocks

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
SCALE_FORMATS = ("fp32", "ue8m0")


def round_to_e4m3(y: jax.Array) -> jax.Array:
    """Rounds float32 to the nearest E4M3 value, ties to even, as float32; beyond 464 and NaN -> NaN."""
    _, exponent = jnp.frexp(y)  # |y| in [2^(e-1), 2^e)
    ulp_exponent = jnp.maximum(exponent - 1, -6) - 3  # below 2^-6 the format is subnormal: fixed spacing 2^-9
    rounded = jnp.ldexp(jnp.round(jnp.ldexp(y, -ulp_exponent)), ulp_exponent)
    return jnp.where(jnp.abs(rounded) <= E4M3_MAX, rounded, jnp.nan)


def divide(x: jax.Array, s: jax.Array) -> jax.Array:
    """x / s, correctly rounded, wherever it is compiled.

    XLA turns a division by a constant or by a broadcast array into a multiplication by the rounded reciprocal, and so
    moves values that lie on a rounding boundary of float8. The added zero keeps the divisor an ordinary array. A
    non-finite x gives NaN.
    """
    return x / (s + 0 * x)


def scale_of_amax(amax: jax.Array) -> jax.Array:
    """max(amax, 1e-4) / 448."""
    return divide(jnp.maximum(amax, AMAX_FLOOR), jnp.float32(E4M3_MAX))


def scale_from_amax(amax: jax.Array, scale: str) -> jax.Array:
    """Returns the scale of a block whose largest magnitude is `amax`."""
    s = scale_of_amax(amax)
    if scale == "ue8m0":
        mantissa, exponent = jnp.frexp(s)  # s = mantissa * 2^exponent, mantissa in [0.5, 1)
        power = jnp.ldexp(jnp.float32(1), jnp.where(mantissa == 0.5, exponent - 1, exponent))
        s = jnp.where(jnp.isfinite(s), power, s)
    return s


def quantize(x: jax.Array, block: Block, scale: str) -> tuple[jax.Array, jax.Array]:
    """x [..., M, K] -> q e4m3 [..., M, K], s float32 [..., ceil(M/bm), ceil(K/bk)] with x ~= q * s."""
    tiles = split_blocks(x.astype(jnp.float32), block)
    s = scale_from_amax(jnp.max(jnp.abs(tiles), axis=(-3, -1)), scale)
    q = round_to_e4m3(divide(tiles, s[..., :, None, :, None]))
    return merge_blocks(q, x.shape).astype(jnp.float8_e4m3fn), s


def dequantize(q: jax.Array, s: jax.Array, block: Block) -> jax.Array:
    """q * s in float32."""
    return q.astype(jnp.float32) * expand_scale(s, block, q.shape)


def swiglu(gate: jax.Array, up: jax.Array, routing_weight: jax.Array | None) -> jax.Array:
    """silu(gate) * up * routing_weight in float32; gate, up [..., M, F], routing_weight [..., M]."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    y = gate / (1 + jnp.exp(-gate)) * up
    return y if routing_weight is None else y * routing_weight.astype(jnp.float32)[..., None]

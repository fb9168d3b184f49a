"""Rotary position embedding with interleaved pairs, and YaRN (report section 4.3; `inference/model.py`).

Dims: r rotary dim (qk_rope_head_dim), t token.
YaRN interpolates the low frequencies and adds mscale**2 to the softmax scale; cos and sin carry only
the ratio mscale / mscale_all_dim, which is 1 for every released model.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig, YarnConfig


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _correction_range(yarn: YarnConfig, dim: int, theta: float) -> tuple[int, int]:
    """First and last rotary pair of the ramp between kept and interpolated frequencies."""

    def pair(rotations: float) -> float:
        period = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(theta))

    low, high = math.floor(pair(yarn.beta_fast)), math.ceil(pair(yarn.beta_slow))
    return max(low, 0), min(high, dim - 1)


def inverse_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Angular frequency of each rotary pair, float64 [r/2]; YaRN applied if the config has it."""
    dim, theta, yarn = cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling
    freqs = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if yarn is None:
        return freqs
    low, high = _correction_range(yarn, dim, theta)
    width = (high - low) or 0.001  # of an empty ramp alone: where high < low, it falls, as in the reference
    interpolated = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
    return freqs * (1 - interpolated) + freqs / yarn.factor * interpolated


def softmax_scale(cfg: ModelConfig) -> float:
    """qk_head_dim**-0.5, times YaRN's mscale squared."""
    scale = cfg.qk_head_dim**-0.5
    if cfg.rope_scaling is not None and cfg.rope_scaling.mscale_all_dim:
        scale *= _yarn_mscale(cfg.rope_scaling.factor, cfg.rope_scaling.mscale_all_dim) ** 2
    return scale


def rope_table(cfg: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [*positions.shape, r/2], for integer positions."""
    frequencies_r = jnp.asarray(inverse_frequencies(cfg), jnp.float32)
    angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies_r)
    ratio = 1.0
    if (yarn := cfg.rope_scaling) is not None:
        ratio = _yarn_mscale(yarn.factor, yarn.mscale) / _yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return jnp.cos(angles) * ratio, jnp.sin(angles) * ratio


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the interleaved pairs (x0, x1), (x2, x3), ... of the last dim, in float32.

    x [..., r]; cos and sin [..., r/2], broadcast against x without its last dim. Result in the dtype of x.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)

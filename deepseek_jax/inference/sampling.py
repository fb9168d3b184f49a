"""Choosing the next token: greedy, temperature, top-p.

Dims: b batch, v vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

_SMALLEST = float(np.finfo(np.float32).tiny)  # of the temperatures, and of their reciprocals
# Sums of float32 probabilities are this far off: a nucleus that reaches top_p up to rounding reaches it.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p 1 keeps the whole distribution."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be finite and >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")

    @property
    def greedy(self) -> bool:
        """Also a temperature that float32 does not hold, whose distribution is the most likely token's alone."""
        return self.temperature < _SMALLEST


def filtered_logits(logits_bv: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that is sampled: scaled by temperature, -inf outside the nucleus.

    The nucleus is the smallest set of most likely tokens with probability >= top_p together; of equally likely
    ones, those with the lower ids come first. The largest logit is 0, so that no temperature overflows. `sampling`
    must not be greedy.
    """
    highest = jnp.max(logits_bv, axis=-1, keepdims=True)
    logits_bv = (logits_bv - highest) / min(sampling.temperature, 1 / _SMALLEST)
    if sampling.top_p >= 1.0:
        return logits_bv
    descending = jnp.sort(logits_bv, axis=-1)[..., ::-1]
    prob = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(prob, axis=-1) - prob
    size = jnp.sum(before < sampling.top_p * (1 - _ROUNDING), axis=-1, keepdims=True)
    last = jnp.take_along_axis(descending, jnp.maximum(size, 1) - 1, axis=-1)
    above, equal = logits_bv > last, logits_bv == last
    room = jnp.maximum(size, 1) - jnp.sum(above, axis=-1, keepdims=True)
    return jnp.where(above | (equal & (jnp.cumsum(equal, axis=-1) <= room)), logits_bv, -jnp.inf)


def sample(key: jax.Array, logits_bv: jax.Array, sampling: Sampling) -> jax.Array:
    """One token per row, int32 [b]."""
    if sampling.greedy:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filtered_logits(logits_bv, sampling)).astype(jnp.int32)

"""Choosing the next token: greedy, temperature, top-p.

Dims: b batch, v vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p 1 keeps the whole distribution."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")


def filtered_logits(logits_bv: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that is sampled: scaled by temperature (> 0), -inf outside the nucleus.

    The nucleus is the smallest set of most likely tokens with probability >= top_p together.
    """
    logits_bv = logits_bv / sampling.temperature
    if sampling.top_p >= 1.0:
        return logits_bv
    descending = jnp.sort(logits_bv, axis=-1)[..., ::-1]
    prob = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(prob, axis=-1) - prob
    last = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True) - 1
    threshold = jnp.take_along_axis(descending, last, axis=-1)
    return jnp.where(logits_bv >= threshold, logits_bv, -jnp.inf)


def sample(key: jax.Array, logits_bv: jax.Array, sampling: Sampling) -> jax.Array:
    """One token per row, int32 [b]."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filtered_logits(logits_bv, sampling)).astype(jnp.int32)

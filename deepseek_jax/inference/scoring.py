"""Logits and log-probabilities of given tokens. Rows are padded to few lengths: one compilation for each, not for each text.

Dims: b row, t token, v vocabulary, l layer, e expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import logits
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.transformer import forward

SMALLEST = 64  # tokens of a padded row


def size_for(n: int) -> int:
    """Tokens to which n are padded: the smallest 64, 96, 128, 192, 256, 384, ... (2^i and 3 * 2^i) >= n."""
    power = max(SMALLEST, 1 << (n - 1).bit_length())
    smaller = power * 3 // 4
    return smaller if n <= smaller and smaller > SMALLEST else power


@functools.partial(jax.jit, static_argnames=("cfg",))
def _logits(params: Any, cfg: ModelConfig, tokens_bt: jax.Array, bias_le: Any) -> jax.Array:
    h_btd, _ = forward(params, cfg, Inputs(tokens_bt), bias_le, single_device(), mtp=False)
    return logits(params, h_btd)


@jax.jit
def _next_logprobs(logits_btv: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """Log-probability of token i + 1 at each position i, [b, t - 1]."""
    log_prob = jax.nn.log_softmax(logits_btv[:, :-1], axis=-1)
    return jnp.take_along_axis(log_prob, tokens_bt[:, 1:, None], axis=-1)[..., 0]


def _padded(params: Any, cfg: ModelConfig, ids: list[int], bias_le: Any) -> tuple[jax.Array, np.ndarray]:
    """Logits and tokens of one row, padded on the right, which no token before sees."""
    if len(ids) > cfg.max_position_embeddings:
        raise ValueError(f"{len(ids)} tokens exceed max_position_embeddings={cfg.max_position_embeddings}")
    if min(ids) < 0 or max(ids) >= cfg.vocab_size:
        raise ValueError(
            f"token ids {min(ids)} to {max(ids)} exceed [0, vocab_size={cfg.vocab_size}): "
            "use the checkpoint's own tokenizer"
        )
    padded = np.zeros((1, size_for(len(ids))), np.int32)
    padded[0, : len(ids)] = ids
    return _logits(params, cfg, padded, bias_le), padded


def all_logits(params: Any, cfg: ModelConfig, ids: list[int], balance_bias: Any = None) -> np.ndarray:
    """Float32 logits [t, v] after each of t tokens. Raises ValueError for none, too many, and ids outside the vocabulary."""
    if not ids:
        raise ValueError("logits needs at least one token")
    return np.asarray(_padded(params, cfg, ids, balance_bias)[0])[0, : len(ids)]


def logprobs(params: Any, cfg: ModelConfig, ids: list[int], balance_bias: Any = None) -> np.ndarray:
    """Log-probability (nats) of each token given those before it, float32 [t - 1]. Raises ValueError as `all_logits`, and
    for a single token."""
    if len(ids) < 2:
        raise ValueError(f"score needs at least two tokens, got {len(ids)}")
    return np.asarray(_next_logprobs(*_padded(params, cfg, ids, balance_bias)))[0, : len(ids) - 1]

"""Batches of outputs, as GRPO reads them, and the smallest run."""

import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.id_sets import packed
from deepseek_jax.posttraining.grpo_config import GRPOLossConfig
from tests.tiny_run import tiny

T, TEMPERATURE, V = 16, 0.7, 384
LOSS = GRPOLossConfig(beta=0.04, off_policy_delta=0.05)


def config(model=None, **train):
    return tiny(
        model={"vocab_size": V, "num_hidden_layers": 1, "first_k_dense_replace": 0} | (model or {}),
        data={"seq_len": T},
        optimizer={"moment_dtype": "float32", "clip_norm": 1e9},
        train={"detached_mtp": True, "loss_chunk": 24, **train},
    )


def outputs(rows=8, seed=0):
    """Rows of a prompt, an output and padding; one has no output, one is nothing but padding."""
    rng, at = np.random.default_rng(seed), np.arange(T + 1)
    prompt = rng.integers(1, 6, (rows, 1))
    end = prompt + rng.integers(2, 11, (rows, 1))
    end[2], prompt[2] = prompt[2], prompt[2]
    end[5] = 0
    tokens = rng.integers(0, V, (rows, T + 1), np.int32)
    kept = rng.uniform(size=(rows, T + 1, V)) < 0.5
    np.put_along_axis(kept, tokens[..., None].astype(np.int64), True, -1)
    logp = rng.normal(-5, 0.5, (3, rows, T + 1)).astype(np.float32)
    return {
        "tokens": tokens,
        "loss_mask": (at >= prompt) & (at < end),
        "padding": at >= end,
        "advantages": rng.standard_normal(rows).astype(np.float32),
        "old_logp": logp[0],
        "ref_logp": logp[0] + 0.2 * logp[1] + 1,
        "sampler_logp": logp[0] + 0.1 * logp[2] + 0.5,
        "kept": np.asarray(packed(jnp.asarray(kept.reshape(-1, V)))).reshape(rows, T + 1, -1),
    }, kept

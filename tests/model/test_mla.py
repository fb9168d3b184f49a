"""MLA: expanded form against the oracle, absorbed decoding against the expanded form, causality by gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.cache import LatentCache
from deepseek_jax.model.mla import absorb, down, mla, mla_decode
from deepseek_jax.model.rope import rope_table
from tests.oracle import model as oracle
from tests.oracle.slots import Apart, View
from tests.oracle.tiny import V2, V3, checkpoint, rel, weights

B, T = 2, 70  # more than one chunk of the attention core
X = np.random.default_rng(5).standard_normal((B, T, V3.hidden_size)).astype(np.float32)
POSITIONS = np.arange(T)[None]


def layer(cfg):
    """(parameters of the first attention layer, oracle of it)"""
    params, bias = weights(cfg)
    tensors, config = checkpoint(cfg, params, bias)
    zeros = np.zeros(T, int)

    def run(x, segments=zeros):
        def get(name):
            return tensors[f"model.layers.0.self_attn.{name}.weight"]

        return oracle.attention(get, config, x.astype(np.float64), POSITIONS[0], segments)

    return jax.tree.map(lambda w: w[0], params["dense_layers"]["attn"]), run


@pytest.mark.parametrize("cfg", [V3, V2], ids=["q_lora", "full_rank_queries_yarn"])
def test_both_forms(cfg):
    p, run = layer(cfg)
    rope = rope_table(cfg, jnp.asarray(POSITIONS))
    got, latent = jax.jit(lambda x: mla(p, cfg, x, rope))(X)
    assert rel(got, np.stack([run(x) for x in X])) < 1e-5
    assert latent.c_bsc.shape == (B, T, cfg.kv_lora_rank)
    assert latent.r_bsr.shape == (B, T, cfg.qk_rope_head_dim)
    # Decoding three tokens at the end of a cache with room to spare.
    spare, last = 6, 3
    cache = LatentCache(*(jnp.pad(x, ((0, 0), (0, spare), (0, 0)), constant_values=np.nan) for x in latent))
    cache = jax.tree.map(lambda x: jnp.nan_to_num(x, nan=1e4), cache)  # must not be looked at
    mask = np.arange(T + spare)[None] <= np.arange(T - last, T)[:, None]
    tail = tuple(x[:, T - last :] for x in rope)
    positions = jnp.asarray(POSITIONS[:, T - last :])
    masks = jnp.asarray(np.broadcast_to(mask, (B, *mask.shape)))
    over_cache = functools.partial(
        View(Apart(LatentCache(*(x[None] for x in cache))), jnp.int32(T - last), positions, masks).attend, 0
    )
    absorbed = jax.jit(lambda x: mla_decode(absorb(p, cfg), cfg, down(p, cfg, x), tail, over_cache))(
        X[:, T - last :]
    )
    assert rel(absorbed, got[:, T - last :]) < 1e-5


def test_segments_hide_the_other_document():
    p, run = layer(V3)
    segments = np.where(np.arange(T) < 33, 0, 1)
    rope = rope_table(V3, jnp.asarray(POSITIONS))
    got, _ = jax.jit(lambda x: mla(p, V3, x, rope, jnp.asarray(segments)[None]))(X[:1])
    assert rel(got[0], run(X[0], segments)) < 1e-5
    assert rel(run(X[0]), run(X[0], segments)) > 0.01


def test_causal_by_gradient():
    """Output t depends on inputs up to t, on all of them, and on nothing after."""
    cfg = dataclasses.replace(V3, q_lora_rank=None)
    p, _ = layer(cfg)
    rope = rope_table(cfg, jnp.asarray(POSITIONS))
    t = 65
    reach = jax.jit(jax.grad(lambda x: mla(p, cfg, x, rope)[0][0, t].sum()))(X[:1])[0]
    assert (np.abs(reach[: t + 1]).max(-1) > 0).all()
    assert (np.asarray(reach[t + 1 :]) == 0).all()

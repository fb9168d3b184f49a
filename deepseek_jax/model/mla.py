"""Multi-head Latent Attention (report section 2.1.1, equations 1-11).

Two forms of the same function: `mla` expands keys and values per head (training, prefill), `mla_decode`
absorbs the up-projections into the query and the output and attends over the latent cache (decoding).
The cache holds, per token and layer, the normalised latent (kv_lora_rank) and the rotated shared key
(qk_rope_head_dim); nothing per head.

Dims: b batch, t query token, s cached token, d hidden, q query latent, c key/value latent, h heads,
n nope head dim, r rope head dim, k = n + r, v value head dim.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import causal_attention
from deepseek_jax.model.layers import MLA_UP, Params, linear, rms_norm
from deepseek_jax.model.params import Param, declare
from deepseek_jax.model.rope import apply_rope, rope_table, softmax_scale
from deepseek_jax.precision.attention import projected_attention
from deepseek_jax.precision.linear import Weight

# Of the two latent norms. The released code does not take rms_norm_eps there, which differs for Moonlight.
LATENT_EPS = 1e-6

Rope = tuple[jax.Array, jax.Array]  # cos and sin, each [b or 1, t, r/2]


class LatentCache(NamedTuple):
    """c_bsc: normalised latents; r_bsr: rotated shared keys. Stacked on a leading layer axis by the model."""

    c_bsc: jax.Array
    r_bsr: jax.Array


def mla_params(cfg: ModelConfig) -> dict[str, Param]:
    d, h, c, q = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.q_lora_rank
    n, r, v, k = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.qk_head_dim
    if q is None:
        queries = {"wq_dhk": Param((d, h, k), ("embed", "heads", None), n_in=1)}
    else:
        queries = {
            "wq_a_dq": Param((d, q), ("embed", "lora"), n_in=1),
            "q_norm_q": Param((q,), (None,), "ones"),
            "wq_b_qhk": Param((q, h, k), ("lora", "heads", None), n_in=1),
        }
    return queries | {
        "wkv_a_dc": Param((d, c + r), ("embed", "lora"), n_in=1),
        "kv_norm_c": Param((c,), (None,), "ones"),
        "wkv_b_chm": Param((c, h, n + v), ("lora", "heads", None), n_in=1),
        "wo_hvd": Param((h, v, d), ("heads", None, "embed"), n_in=2),
    }


def query_latents(p: Params, cfg: ModelConfig, x_btd: jax.Array) -> jax.Array:
    """What queries are projected up from (equation 6): [b, t, q], or x itself with full-rank queries."""
    if cfg.q_lora_rank is None:
        return x_btd
    return rms_norm(linear(x_btd, p["wq_a_dq"]), p["q_norm_q"], LATENT_EPS)


def _queries(p: Params, cfg: ModelConfig, q_lora_btq: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Query parts [b, t, h, n] and, rotated, [b, t, h, r] (equations 7-9) of `query_latents`."""
    up = p["wq_dhk"] if cfg.q_lora_rank is None else p["wq_b_qhk"]
    q_bthk = checkpoint_name(linear(q_lora_btq, up), MLA_UP)
    q_nope, q_rope = jnp.split(q_bthk, [cfg.qk_nope_head_dim], axis=-1)
    cos, sin = rope
    return q_nope, apply_rope(q_rope, cos[:, :, None], sin[:, :, None])


def latents(p: Params, cfg: ModelConfig, x_btd: jax.Array, rope: Rope) -> LatentCache:
    """What the cache keeps of each token (equations 1-3): [b, t, c] and [b, t, r]."""
    c_btc, r_btr = jnp.split(linear(x_btd, p["wkv_a_dc"]), [cfg.kv_lora_rank], axis=-1)
    return LatentCache(rms_norm(c_btc, p["kv_norm_c"], LATENT_EPS), apply_rope(r_btr, *rope))


# Queries and keys [b, t, h, k], values [b, t, h, v]
CoreInputs = tuple[jax.Array, jax.Array, jax.Array]


def expand(p: Params, cfg: ModelConfig, q_lora_btq: jax.Array, latent: LatentCache, rope: Rope) -> CoreInputs:
    """What the attention core reads of `query_latents` and `latents`, for the heads whose weights `p` holds."""
    q_nope, q_rope = _queries(p, cfg, q_lora_btq, rope)
    kv_bthm = checkpoint_name(linear(latent.c_bsc, p["wkv_b_chm"]), MLA_UP)
    k_nope, v_bthv = jnp.split(kv_bthm, [cfg.qk_nope_head_dim], axis=-1)
    k_rope = jnp.broadcast_to(latent.r_bsr[:, :, None], q_rope.shape)
    q_bthk = jnp.concatenate([q_nope, q_rope], axis=-1)
    k_bthk = jnp.concatenate([k_nope, k_rope], axis=-1)
    return q_bthk, k_bthk, v_bthv


def core_inputs(p: Params, cfg: ModelConfig, x_btd: jax.Array, rope: Rope) -> tuple[CoreInputs, LatentCache]:
    """What the attention core reads, expanded per head, and the latents."""
    latent = latents(p, cfg, x_btd, rope)
    return expand(p, cfg, query_latents(p, cfg, x_btd), latent, rope), latent


def core_output(p: Params, cfg: ModelConfig, qkv: CoreInputs, segments_bt: jax.Array | None) -> jax.Array:
    """Causal attention and output projection -> [b, t, d], the sum over the heads whose weights `p` holds."""
    core = (*qkv, softmax_scale(cfg), segments_bt)
    if isinstance(p["wo_hvd"], Weight):
        return projected_attention(*core, p["wo_hvd"])
    return linear(causal_attention(*core), p["wo_hvd"], n_in=2)


def mla(
    p: Params,
    cfg: ModelConfig,
    x_btd: jax.Array,
    rope: Rope,
    segments_bt: jax.Array | None = None,
) -> tuple[jax.Array, LatentCache]:
    """Expanded form: causal self-attention over the t tokens. Returns (output [b, t, d], latents)."""
    qkv, latent = core_inputs(p, cfg, x_btd, rope)
    return core_output(p, cfg, qkv, segments_bt), latent


def absorb(p: Params, cfg: ModelConfig) -> Params:
    """Weights of `mla_decode`: the key and value halves of wkv_b per head (leading layer axes allowed)."""
    wk, wv = jnp.split(p["wkv_b_chm"], [cfg.qk_nope_head_dim], axis=-1)
    rest = {name: w for name, w in p.items() if name != "wkv_b_chm"}
    return rest | {"wk_hnc": jnp.einsum("...chn->...hnc", wk), "wv_hcv": jnp.einsum("...chv->...hcv", wv)}


def mla_decode(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, rope: Rope, cache: LatentCache, mask_bts: jax.Array
) -> jax.Array:
    """Absorbed form: t new tokens attend over a cache that already holds them. Returns [b, t, d].

    `p` comes from `absorb`. `mask_bts` is True where query t may see cache slot s. Scores and softmax are in float32.
    """
    dtype = x_btd.dtype
    q_nope, q_rope = _queries(p, cfg, query_latents(p, cfg, x_btd), rope)
    q_bthc = jnp.einsum("bthn,hnc->bthc", q_nope, p["wk_hnc"].astype(dtype))
    score = jnp.einsum("bthc,bsc->bhts", q_bthc, cache.c_bsc, preferred_element_type=jnp.float32)
    score += jnp.einsum("bthr,bsr->bhts", q_rope, cache.r_bsr, preferred_element_type=jnp.float32)
    score = jnp.where(mask_bts[:, None], score * softmax_scale(cfg), -jnp.inf)
    prob = jax.nn.softmax(score, axis=-1).astype(dtype)
    o_bthc = jnp.einsum("bhts,bsc->bthc", prob, cache.c_bsc)
    o_bthv = jnp.einsum("bthc,hcv->bthv", o_bthc, p["wv_hcv"].astype(dtype))
    return linear(o_bthv, p["wo_hvd"], n_in=2)


class MLA(nn.Module):
    """Multi-head Latent Attention over [b, t, d], as a module of its own (study, notebooks)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, positions: jax.Array | None = None) -> Any:
        if positions is None:
            positions = jnp.arange(x_btd.shape[1])[None]
        p = declare(self, mla_params(self.cfg), self.cfg.initializer_range)
        return mla(p, self.cfg, x_btd, rope_table(self.cfg, positions))[0]

"""Multi-head Latent Attention (report section 2.1.1, equations 1-11).

Two forms of the same function: `mla` expands keys and values per head (training, prefill), `mla_decode`
absorbs the up-projections into the query and the output and attends over the latent cache (decoding). `over_pages.py`
has the expanded form over a paged cache.
The cache holds, per token and layer, the normalised latent (kv_lora_rank) and the rotated shared key
(qk_rope_head_dim); nothing per head.

Dims: b batch, t query token, s cached token, d hidden, q query latent, c key/value latent, h heads,
n nope head dim, r rope head dim, k = n + r, v value head dim.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import (
    CoreInputs,
    core_inputs,
    core_output,
    core_output_backward,
    core_output_forward,
)
from deepseek_jax.model.cache import LatentCache
from deepseek_jax.model.layers import Params, linear, rms_norm
from deepseek_jax.model.params import Param
from deepseek_jax.model.rope import apply_rope, softmax_scale
from deepseek_jax.precision.product import product
from deepseek_jax.precision.sums import precision

# Of the two latent norms. The released code does not take rms_norm_eps there, which differs for Moonlight.
LATENT_EPS = 1e-6

Rope = tuple[jax.Array, jax.Array]  # cos and sin, each [b or 1, t, r/2]


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


class Low(NamedTuple):
    """Tokens projected down, before norm and RoPE: all that the rest of the attention reads of them.

    q_btq: for the queries; with full-rank queries, what they are projected from. kv_btm: latents c, then shared keys r.
    """

    q_btq: jax.Array
    kv_btm: jax.Array


def down(p: Params, cfg: ModelConfig, x_btd: jax.Array) -> Low:
    """Down-projections (equations 1, 3, 6), in one product where their weights are joined."""
    if "wqkv_a_dm" in p:
        low_btm = linear(x_btd, p["wqkv_a_dm"])
        return Low(low_btm[..., : cfg.q_lora_rank], low_btm[..., cfg.q_lora_rank :])
    q_btq = x_btd if cfg.q_lora_rank is None else linear(x_btd, p["wq_a_dq"])
    return Low(q_btq, linear(x_btd, p["wkv_a_dc"]))


def latents(p: Params, cfg: ModelConfig, low: Low, rope: Rope) -> LatentCache:
    """What the cache keeps of each token (equations 1-3): [b, t, c] and [b, t, r]."""
    c_btc, r_btr = jnp.split(low.kv_btm, [cfg.kv_lora_rank], axis=-1)
    return LatentCache(rms_norm(c_btc, p["kv_norm_c"], LATENT_EPS), apply_rope(r_btr, *rope))


def _queries(p: Params, cfg: ModelConfig, low: Low, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Query parts [b, t, h, n] and, rotated, [b, t, h, r] (equations 6-9)."""
    if cfg.q_lora_rank is None:
        q_bthk = linear(low.q_btq, p["wq_dhk"])
    else:
        q_bthk = linear(rms_norm(low.q_btq, p["q_norm_q"], LATENT_EPS), p["wq_b_qhk"])
    q_nope, q_rope = jnp.split(q_bthk, [cfg.qk_nope_head_dim], axis=-1)
    cos, sin = rope
    return q_nope, apply_rope(q_rope, cos[:, :, None], sin[:, :, None])


def expand(p: Params, cfg: ModelConfig, low: Low, rope: Rope) -> tuple[CoreInputs, LatentCache]:
    """What the attention core reads, for the heads whose weights `p` holds, and the latents."""
    latent = latents(p, cfg, low, rope)
    q_nope, q_rope = _queries(p, cfg, low, rope)
    k_nope, v_bshv = jnp.split(linear(latent.c_bsc, p["wkv_b_chm"]), [cfg.qk_nope_head_dim], axis=-1)
    q_bthk = jnp.concatenate([q_nope, q_rope], axis=-1)
    return core_inputs(q_bthk, _keys(k_nope, latent.r_bsr), v_bshv, softmax_scale(cfg)), latent


def _keys(k_nope: jax.Array, r_bsr: jax.Array) -> jax.Array:
    """Keys [b, s, h, k] of all heads, which share the rotary part."""
    # Over float32, so that backward the heads' gradients of the shared key are added up in it.
    shared = r_bsr[:, :, None].astype(jnp.float32)
    k_rope = jnp.broadcast_to(shared, (*k_nope.shape[:3], r_bsr.shape[-1])).astype(k_nope.dtype)
    return jnp.concatenate([k_nope, k_rope], axis=-1)


# --- core and output projection -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expanding_again(cfg, p, low, rope, qkv, segments_bt, wo):  # type: ignore[no-untyped-def]
    return core_output_forward(qkv, segments_bt, wo)[0]


def _expanding_again_fwd(cfg, p, low, rope, qkv, segments_bt, wo):  # type: ignore[no-untyped-def]
    y_btd, kept = core_output_forward(qkv, segments_bt, wo)
    return y_btd, (p, low, rope, segments_bt, kept)


def _expanding_again_bwd(cfg, saved, dy_btd):  # type: ignore[no-untyped-def]
    p, low, rope, segments_bt, kept = saved
    # Behind the gradient, so that the compiler does not take the forward pass's arrays and keep them.
    low, dy_btd = lax.optimization_barrier((low, dy_btd))
    qkv, vjp = jax.vjp(lambda p, low: expand(p, cfg, low, rope)[0], p, low)
    d_qkv, d_wo = core_output_backward(qkv, segments_bt, kept, dy_btd)
    return *vjp(d_qkv), None, None, None, d_wo


_expanding_again.defvjp(_expanding_again_fwd, _expanding_again_bwd)


class Expanded(NamedTuple):
    """Between the two parts of an attention. `low`: what the core's inputs are to be recomputed from in the backward
    pass, which gives it their gradient; None where they are kept."""

    qkv: CoreInputs
    low: Low | None


def expanded(p: Params, cfg: ModelConfig, low: Low, rope: Rope, recompute: bool) -> Expanded:
    """`expand`, whose results the backward pass gets from `low` again if it is to `recompute` (section 3.2.3)."""
    if not recompute:
        return Expanded(expand(p, cfg, low, rope)[0], None)
    return Expanded(expand(lax.stop_gradient(p), cfg, lax.stop_gradient(low), rope)[0], low)


def attend(
    p: Params, cfg: ModelConfig, inputs: Expanded, rope: Rope, segments_bt: jax.Array | None
) -> jax.Array:
    """`core_output` of what `expanded` gave; `rope` as there."""
    if inputs.low is None:
        return core_output(inputs.qkv, segments_bt, p["wo_hvd"])
    names = ("q_norm_q", "wq_b_qhk", "wq_dhk", "kv_norm_c", "wkv_b_chm")
    up = {name: p[name] for name in names if name in p}
    wo = product(p["wo_hvd"], n_in=2)
    return _expanding_again(cfg, up, inputs.low, rope, inputs.qkv, segments_bt, wo)


def mla(
    p: Params,
    cfg: ModelConfig,
    x_btd: jax.Array,
    rope: Rope,
    segments_bt: jax.Array | None = None,
) -> tuple[jax.Array, LatentCache]:
    """Expanded form: causal self-attention over the t tokens. Returns (output [b, t, d], latents). `block.py` has the
    same with norm, residual and recomputation."""
    qkv, latent = expand(p, cfg, down(p, cfg, x_btd), rope)
    return attend(p, cfg, Expanded(qkv, None), rope, segments_bt), latent


# Which dim of the weights of `mla_decode` is the heads.
HEADS = {"wq_dhk": 1, "wq_b_qhk": 1, "wk_hnc": 0, "wv_hcv": 0, "wo_hvd": 0}


def absorb(p: Params, cfg: ModelConfig) -> Params:
    """Weights of `mla_decode` and `expand_latents`: the key and value halves of wkv_b per head (a leading layer axis
    allowed)."""
    wk, wv = jnp.split(product(p["wkv_b_chm"]).array(cfg.dtype), [cfg.qk_nope_head_dim], axis=-1)
    rest = {name: w for name, w in p.items() if name != "wkv_b_chm"}
    return rest | {"wk_hnc": jnp.einsum("...chn->...hnc", wk), "wv_hcv": jnp.einsum("...chv->...hcv", wv)}


def mla_decode(
    p: Params,
    cfg: ModelConfig,
    low: Low,
    rope: Rope,
    over_cache: Callable[[jax.Array, jax.Array, float], jax.Array],
) -> jax.Array:
    """Absorbed form: t new tokens, projected `down`, attend over a cache that already holds them. Returns [b, t, d], the sum
    over the heads whose weights there are.

    `p` comes from `absorb`, `over_cache` from a view: its `attend`, for this layer.
    """
    return _absorbed_output(p, over_cache(*absorbed_queries(p, cfg, low, rope), softmax_scale(cfg)))


class Absorbed(NamedTuple):
    """Queries of the absorbed form, not scaled: of the latents [b, t, h, c], and of the rotated keys [b, t, h, r]."""

    q_bthc: jax.Array
    q_bthr: jax.Array

    def attend(self, p: Params, cfg: ModelConfig, view: Any, i: Any) -> jax.Array:
        """The attention's output [b, t, d] over the latents of layer i of a view, the sum over the heads of p."""
        return _absorbed_output(p, view.attend(i, *self, softmax_scale(cfg)))


def absorbed_queries(p: Params, cfg: ModelConfig, low: Low, rope: Rope) -> Absorbed:
    """Of the heads whose weights there are."""
    q_nope, q_rope = _queries(p, cfg, low, rope)
    return Absorbed(_by_heads(jnp.moveaxis(q_nope, 2, 0), p["wk_hnc"]), q_rope)


def _absorbed_output(p: Params, o_bhtc: jax.Array) -> jax.Array:
    o_bthv = _by_heads(jnp.moveaxis(o_bhtc, 1, 0), p["wv_hcv"])
    return linear(o_bthv, p["wo_hvd"], n_in=2)


def _by_heads(x_hbtn: jax.Array, w_hnc: jax.Array) -> jax.Array:
    """The product of each head [b, t, h, c]. Rows first, then the weight's: the other way round, which einsum may choose, a few
    rows take XLA on CPUs 12 times as long."""
    h, b, t, _ = x_hbtn.shape
    y_hmc = lax.dot_general(
        x_hbtn.reshape(h, b * t, -1),
        w_hnc.astype(x_hbtn.dtype),
        (((2,), (1,)), ((0,), (0,))),
        precision=precision(x_hbtn.dtype),
    )
    return jnp.moveaxis(y_hmc.reshape(h, b, t, -1), 0, 2)


def queries(p: Params, cfg: ModelConfig, low: Low, rope: Rope) -> jax.Array:
    """Of the heads whose weights there are [b, t, h, k], not scaled."""
    return jnp.concatenate(_queries(p, cfg, low, rope), axis=-1)


def expand_latents(p: Params, latent: LatentCache) -> tuple[jax.Array, jax.Array]:
    """Keys [b, s, h, k] and values [b, s, h, v] of cached tokens (equations 2, 4, 5), by the weights of `absorb`."""
    dtype, exact = latent.c_bsc.dtype, precision(latent.c_bsc.dtype)
    k_nope = jnp.einsum("bsc,hnc->bshn", latent.c_bsc, p["wk_hnc"].astype(dtype), precision=exact)
    v_bshv = jnp.einsum("bsc,hcv->bshv", latent.c_bsc, p["wv_hcv"].astype(dtype), precision=exact)
    return _keys(k_nope, latent.r_bsr), v_bshv

"""The model over the latent cache, a few new tokens at a time (absorbed MLA, report section 2.1.1).

`prepare` arranges the weights once, before the decoding loop: the up-projections of MLA per head, and the layers
of a shallow model apart, so that no step slices or transposes a weight. The cache follows: one `LatentCache` per
layer, or one whose arrays are stacked on a layer axis where the layers are scanned.

Dims: b batch, t new token, s cache slot, d hidden, l layer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.experts import decode_experts
from deepseek_jax.model.layers import Params, embed, rms_norm
from deepseek_jax.model.mla import LatentCache, Rope, absorb, down, latents, mla_decode
from deepseek_jax.model.moe import Experts
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.transformer import ffn, mtp_input

# Up to this many layers are unrolled; a deeper model is scanned, at the price of a copy of each layer's weights.
UNROLL_LAYERS = 8

Cache = Any  # list of LatentCache [b, s, ...], or one LatentCache [l, b, s, ...]


def _stacks(params: Params) -> list[str]:
    return [name for name in ("dense_layers", "moe_layers") if name in params]


def _split(tree: Any, n: int) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(n)]


def prepare(params: Params, cfg: ModelConfig) -> Params:
    """Parameters as `decode` and `mtp_decode` read them. Cheap next to a prefill; call it outside the loop."""
    ready = dict(params)
    for name in _stacks(params):
        ready[name] = {**params[name], "attn": absorb(params[name]["attn"], cfg)}
        if cfg.num_hidden_layers <= UNROLL_LAYERS:
            ready[name] = _split(ready[name], len(params[name]["attn_norm_d"]))
    if "mtp" in params:
        first = jax.tree.map(lambda x: x[0], params["mtp"])
        block = {**first["block"], "attn": absorb(first["block"]["attn"], cfg)}
        ready["mtp"] = {**first, "block": block}
    return ready


def prepare_cache(cache: LatentCache, cfg: ModelConfig) -> Cache:
    """The stacked latents of a prefill in the form that goes with `prepare`."""
    n = cfg.num_hidden_layers
    return _split(cache, n) if n <= UNROLL_LAYERS else cache


def _write(cache: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """`new` [b, t, ...] into slots slot .. slot + t - 1 of `cache` [b, s, ...]; `slot` is [] or [b]."""
    new = new.astype(cache.dtype)
    if jnp.ndim(slot) == 0:
        return lax.dynamic_update_slice_in_dim(cache, new, slot, 1)
    return jax.vmap(lambda c, n, s: lax.dynamic_update_slice_in_dim(c, n, s, 0))(cache, new, slot)


class Step(NamedTuple):
    """What all blocks of one pass share."""

    rope: Rope
    slot: jax.Array
    mask_bts: jax.Array
    experts: Experts


def _block(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, ctx: Step, cache: LatentCache, bias_e: Any
) -> tuple[jax.Array, LatentCache]:
    h_btd = rms_norm(x_btd, p["attn_norm_d"], cfg.rms_norm_eps)
    new = latents(p["attn"], cfg, down(p["attn"], cfg, h_btd), ctx.rope)
    cache = jax.tree.map(lambda c, n: _write(c, n, ctx.slot), cache, new)
    x_btd = x_btd + mla_decode(p["attn"], cfg, h_btd, ctx.rope, cache, ctx.mask_bts)
    return ffn(p, cfg, x_btd, bias_e, ctx.experts)[0], cache


def _scanned(
    ready: Params, cfg: ModelConfig, x_btd: jax.Array, ctx: Step, cache: LatentCache, bias_le: Any
) -> Any:
    def body(carry, xs):
        x, whole = carry
        p, bias_e, i = xs
        one = jax.tree.map(lambda c: lax.dynamic_index_in_dim(c, i, 0, keepdims=False), whole)
        y, one = _block(p, cfg, x, ctx, one, bias_e)
        return (y, jax.tree.map(lambda c, o: lax.dynamic_update_index_in_dim(c, o, i, 0), whole, one)), None

    start = 0
    for name in _stacks(ready):
        n = len(ready[name]["attn_norm_d"])
        bias = bias_le[:n] if bias_le is not None and name == "moe_layers" else None
        (x_btd, cache), _ = lax.scan(body, (x_btd, cache), (ready[name], bias, jnp.arange(start, start + n)))
        start += n
    return x_btd, cache


def decode(
    ready: Params,
    cfg: ModelConfig,
    tokens_bt: jax.Array,
    cache: Cache,
    slot: jax.Array,
    positions_bt: jax.Array,
    mask_bts: jax.Array,
    balance_bias: jax.Array | None = None,
    experts: Experts = decode_experts,
) -> tuple[jax.Array, Cache]:
    """t new tokens per sequence. Returns (hidden states after the final norm [b, t, d], updated cache).

    ready, cache: from `prepare` and `prepare_cache`. The tokens' latents go to slots slot .. slot + t - 1,
    `slot` int32 [] or [b]; `mask_bts` says which slots each token sees, itself included. `experts` computes the routed
    experts: on one device, or over a mesh (`parallel/low_latency.py`).
    """
    ctx = Step(rope_table(cfg, positions_bt), slot, mask_bts, experts)
    x_btd = embed(ready["embed"], cfg, tokens_bt)
    if isinstance(cache, LatentCache):
        x_btd, cache = _scanned(ready, cfg, x_btd, ctx, cache, balance_bias)
    else:
        layers = [(name, i, p) for name in _stacks(ready) for i, p in enumerate(ready[name])]
        updated = []
        for one, (name, i, p) in zip(cache, layers, strict=True):
            bias_e = balance_bias[i] if balance_bias is not None and name == "moe_layers" else None
            x_btd, one = _block(p, cfg, x_btd, ctx, one, bias_e)
            updated.append(one)
        cache = updated
    return rms_norm(x_btd, ready["final_norm"]["scale_d"], cfg.rms_norm_eps), cache


def mtp_decode(
    ready: Params,
    cfg: ModelConfig,
    h_btd: jax.Array,
    next_tokens_bt: jax.Array,
    cache: LatentCache,
    slot: jax.Array,
    positions_bt: jax.Array,
    mask_bts: jax.Array,
    balance_bias: jax.Array | None = None,
) -> tuple[jax.Array, LatentCache]:
    """The first MTP module on t positions: hidden states h_i of the main model (after its final norm) and the
    tokens that follow, t_{i+1}. Returns (states after its norm [b, t, d], which predict t_{i+2}; its cache)."""
    p = ready["mtp"]
    x_btd = mtp_input(p, cfg, h_btd, embed(ready["embed"], cfg, next_tokens_bt))
    bias_e = None if balance_bias is None else balance_bias[cfg.num_moe_layers]
    ctx = Step(rope_table(cfg, positions_bt), slot, mask_bts, decode_experts)
    y_btd, cache = _block(p["block"], cfg, x_btd, ctx, cache, bias_e)
    return rms_norm(y_btd, p["norm_d"], cfg.rms_norm_eps), cache

"""The model over the latent cache, a few new tokens at a time (absorbed MLA, report section 2.1.1).

Decoding reads every weight once per step, so it is as fast as memory lets it be if no step copies or converts a weight.
`prepare` arranges them once per model: in the dtype that they are multiplied in, the up-projections of MLA per head, and
the layers apart. The cache follows: one `LatentCache` per layer, or one whose arrays are stacked on a layer axis where
the layers are scanned.

Dims: b batch, t new token, s cache slot, d hidden, l layer.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.experts import decode_experts
from deepseek_jax.model.layers import Params, embed, rms_norm
from deepseek_jax.model.mla import LatentCache, Rope, absorb, down, latents, mla_decode
from deepseek_jax.model.moe import Experts
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.transformer import ffn, mtp_input

# Up to this many layers are unrolled; a deeper model is scanned. On CPU, where a scan copies each layer's weights and
# layers lie apart at no cost of memory, all are unrolled: 61 layers compile in 15 s.
UNROLL_LAYERS = 8

Cache = list[LatentCache] | LatentCache  # one per layer [b, s, ...], or one [l, b, s, ...]


class View(NamedTuple):
    """Where the new tokens of a pass are: their latents go to slots slot .. slot + t - 1 of a contiguous cache.

    slot: int32 [] or [b]; mask_bts: which slots each token sees, itself included.
    """

    cache: Cache
    slot: jax.Array
    positions_bt: jax.Array
    mask_bts: jax.Array


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def decoding_config(cfg: ModelConfig) -> ModelConfig:
    """The config that decoding runs with: on CPU float32, whatever the compute dtype.

    XLA multiplies no bfloat16 there: it would convert all weights anew, at every call of a program.
    """
    return dataclasses.replace(cfg, dtype="float32") if _on_cpu() else cfg


def unrolled(cfg: ModelConfig) -> bool:
    """Whether the layers, and their caches, lie apart."""
    return cfg.num_hidden_layers <= UNROLL_LAYERS or _on_cpu()


def _stacks(params: Params) -> list[str]:
    return [name for name in ("dense_layers", "moe_layers") if name in params]


def _layer(x: Any, i: int) -> jax.Array:
    """Layer i of a stacked array: in the memory of CPUs the same bytes where these are aligned, else a copy."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return x[i]
    (device, *others) = x.devices()
    if others or device.platform != "cpu":
        return x[i]
    return jax.device_put(np.asarray(x)[i], device if x.committed else None, may_alias=True)


def _split(tree: Any, n: int) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: _layer(x, i), tree) for i in range(n)]


def _as_read(path: Any, x: Any, cfg: ModelConfig) -> Any:
    """A parameter in the dtype in which it is multiplied: the router's float32, norms as they are."""
    names = [key.key for key in path]
    if "norm" in names[-1] or "final_norm" in names:
        return x
    dtype = jnp.dtype("float32" if "gate" in names else cfg.dtype)
    return x if x.dtype == dtype else x.astype(dtype)


def prepare(params: Params, cfg: ModelConfig) -> Params:
    """Parameters as `decode`, `mtp_decode` and `logits` read them; make them once per model.

    Beside `params` they take the memory of the absorbed up-projections, of weights whose dtype is another, and, but on
    a CPU, of the layers set apart.
    """
    params = jax.tree_util.tree_map_with_path(lambda path, x: _as_read(path, x, cfg), dict(params))
    ready = dict(params)
    for name in _stacks(params):
        ready[name] = {**params[name], "attn": absorb(params[name]["attn"], cfg)}
        if unrolled(cfg):
            ready[name] = _split(ready[name], len(params[name]["attn_norm_d"]))
    if "mtp" in params:
        first = jax.tree.map(lambda x: _layer(x, 0), params["mtp"])
        block = {**first["block"], "attn": absorb(first["block"]["attn"], cfg)}
        ready["mtp"] = {**first, "block": block}
    return ready


def prepare_cache(cache: LatentCache, cfg: ModelConfig) -> Cache:
    """The stacked latents of a prefill in the form that goes with `prepare`."""
    cache = jax.tree.map(lambda x: x.astype(cfg.dtype), cache)
    return _split(cache, cfg.num_hidden_layers) if unrolled(cfg) else cache


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
    view: View,
    balance_bias: jax.Array | None = None,
    experts: Experts = decode_experts,
) -> tuple[jax.Array, Cache]:
    """t new tokens per sequence. Returns (hidden states after the final norm [b, t, d], updated cache).

    ready, view.cache: from `prepare` and `prepare_cache`, both with this config. `experts` computes the routed experts:
    on one device, or over a mesh (`parallel/low_latency.py`).
    """
    ctx = Step(rope_table(cfg, view.positions_bt), view.slot, view.mask_bts, experts)
    x_btd = embed(ready["embed"], cfg, tokens_bt)
    if isinstance(view.cache, LatentCache):
        x_btd, cache = _scanned(ready, cfg, x_btd, ctx, view.cache, balance_bias)
    else:
        layers = [(name, i, p) for name in _stacks(ready) for i, p in enumerate(ready[name])]
        cache = []
        for one, (name, i, p) in zip(view.cache, layers, strict=True):
            bias_e = balance_bias[i] if balance_bias is not None and name == "moe_layers" else None
            x_btd, one = _block(p, cfg, x_btd, ctx, one, bias_e)
            cache.append(one)
    return rms_norm(x_btd, ready["final_norm"]["scale_d"], cfg.rms_norm_eps), cache


def mtp_decode(
    ready: Params,
    cfg: ModelConfig,
    h_btd: jax.Array,
    next_tokens_bt: jax.Array,
    view: View,
    balance_bias: jax.Array | None = None,
) -> tuple[jax.Array, LatentCache]:
    """The first MTP module on t positions: hidden states h_i of the main model (after its final norm) and the
    tokens that follow, t_{i+1}. Returns (states after its norm [b, t, d], which predict t_{i+2}; its cache [b, s, ...],
    which `view` holds as that of one layer)."""
    p = ready["mtp"]
    x_btd = mtp_input(p, cfg, h_btd, embed(ready["embed"], cfg, next_tokens_bt))
    bias_e = None if balance_bias is None else balance_bias[cfg.num_moe_layers]
    ctx = Step(rope_table(cfg, view.positions_bt), view.slot, view.mask_bts, decode_experts)
    assert isinstance(view.cache, LatentCache)
    y_btd, cache = _block(p["block"], cfg, x_btd, ctx, view.cache, bias_e)
    return rms_norm(y_btd, p["norm_d"], cfg.rms_norm_eps), cache

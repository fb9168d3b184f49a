"""The model over the latent cache, a few new tokens at a time (absorbed MLA, report section 2.1.1), or over pages a prompt's
chunk (expanded, `over_pages.py`).

Decoding reads every weight once per step, so it is as fast as memory lets it be if no step copies or converts a weight.
`prepare` arranges them once per model: in the dtype that they are multiplied in, the up-projections of MLA per head, and
the layers apart; or on a stack, where they are scanned. Where latents lie is the view's to know (`model/cache.py`).

Dims: b sequence, t new token, d hidden, l layer, e expert.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import ffn
from deepseek_jax.model.dispatch import Local
from deepseek_jax.model.experts import decode_experts, experts_apart
from deepseek_jax.model.layers import Params, embed, rms_norm
from deepseek_jax.model.layout import Context, Layout
from deepseek_jax.model.mla import (
    Absorbed,
    Low,
    absorb,
    absorbed_queries,
    down,
    latents,
)
from deepseek_jax.model.mtp import mtp_input, mtp_latents
from deepseek_jax.model.over_pages import CPU, H100, AsTheyAre, expands, queries_as_they_are
from deepseek_jax.model.params import layers_apart
from deepseek_jax.model.platform import on_cpu
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.weights import join_for_inference

# Up to this many layers are unrolled; a deeper model is scanned. On CPU, where a scan copies each layer's weights and
# layers lie apart at no cost of memory, all are unrolled: 61 layers compile in 15 s.
UNROLL_LAYERS = 8
# Up to this many routed experts, of all layers, lie apart on CPU: each is compiled for itself, in some 50 ms.
APART_EXPERTS = 256


ONE_DEVICE = Layout(Local(decode_experts))


def decoding_config(cfg: ModelConfig) -> ModelConfig:
    """The config that decoding runs with: on CPU float32, whatever the compute dtype.

    XLA multiplies no bfloat16 there: it would convert all weights anew, at every call of a program.
    """
    return dataclasses.replace(cfg, dtype="float32") if on_cpu() else cfg


def unrolled(cfg: ModelConfig) -> bool:
    """Whether the layers, and their caches, lie apart."""
    return cfg.num_hidden_layers <= UNROLL_LAYERS or on_cpu()


def _brings_product(x: Any) -> bool:
    return hasattr(x, "fprop")


def _as_read(path: Any, x: Any, cfg: ModelConfig) -> Any:
    """A parameter in the dtype in which it is multiplied: the router's float32; norms, and weights in FP8, as they are."""
    names = [key.key for key in path]
    if _brings_product(x) or "norm" in names[-1] or "final_norm" in names:
        return x
    dtype = jnp.dtype("float32" if "gate" in names else cfg.dtype)
    return x if x.dtype == dtype else x.astype(dtype)


def _experts_apart(block: Params) -> Params:
    """A block with its experts in arrays of their own, too; on a CPU they are the same bytes."""
    if "gate" not in block["ffn"]:
        return block
    experts = block["ffn"]["experts"]
    return {**block, "ffn": {**block["ffn"], "experts": {**experts, "apart": experts_apart(experts)}}}


def prepare(params: Params, cfg: ModelConfig, whole: bool = True) -> Params:
    """Parameters as `decode`, `mtp_decode` and `logits` read them; make them once per model.

    Beside `params` they take the memory of the absorbed up-projections, of weights whose dtype is another, and, but on
    a CPU, of the layers set apart and of the weights of one input, which are joined: few rows fill a GPU better with a
    wider product, and read their input once. whole: this device has all experts.
    """
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: _as_read(path, x, cfg), dict(params), is_leaf=_brings_product
    )
    ready, once = dict(params), (lambda block: block) if on_cpu() else join_for_inference
    few = cfg.n_routed_experts * cfg.num_moe_layers <= APART_EXPERTS
    apart = _experts_apart if whole and few and on_cpu() else lambda block: block
    for name in [name for name in ("dense_layers", "moe_layers") if name in params]:
        ready[name] = once({**params[name], "attn": absorb(params[name]["attn"], cfg)})
        if unrolled(cfg):
            ready[name] = [apart(p) for p in layers_apart(ready[name], len(params[name]["attn_norm_d"]))]
    if "mtp" in params:
        first = layers_apart(params["mtp"], 1)[0]
        block = {**first["block"], "attn": absorb(first["block"]["attn"], cfg)}
        ready["mtp"] = {**first, "block": apart(once(block))}
    return ready


def attention_in(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, view: Any, i: Any, ctx: Context
) -> tuple[Low, Any]:
    """Norm and down-projections of layer i -> what the rest of its attention reads of the new tokens, and the view with their
    latents."""
    h_btd = rms_norm(x_btd, p["attn_norm_d"], cfg.rms_norm_eps)
    low = ctx.layout.sequence.gathered(down(p["attn"], cfg, h_btd))
    return low, view.append(i, latents(p["attn"], cfg, low, ctx.rope))


def attention_queries(p: Params, cfg: ModelConfig, low: Low, view: Any, ctx: Context) -> Absorbed | AsTheyAre:
    """Of this device's heads: absorbed, or, where many tokens come and expanding the cached ones takes less time, as they are."""
    heads = ctx.layout.sequence.ready_heads(p["attn"])
    expanded = expands(cfg, low.q_btq.shape[1], view.slots, CPU if on_cpu() else H100)
    return (queries_as_they_are if expanded else absorbed_queries)(heads, cfg, low, ctx.rope)


def attention_out(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, q: Absorbed | AsTheyAre, view: Any, i: Any, ctx: Context
) -> jax.Array:
    """x plus the attention of the new tokens over those that the view holds."""
    sequence = ctx.layout.sequence
    heads, seen = sequence.ready_heads(p["attn"]), sequence.seen(view, i)
    return x_btd + sequence.scattered(q.attend(heads, cfg, *seen))


class Chosen(NamedTuple):
    """Where the router sends tokens, int32. counts_le: how many of this device's go to each expert of each MoE layer;
    experts_btlk: those that each token of this device's rows goes to, best first, n_routed_experts where it does not count.
    Inside, of the tokens here: of one layer [e] and [b, t, k], or of all with the layers first."""

    counts_le: jax.Array
    experts_btlk: Any


def by_token(chosen: Chosen, layout: Layout) -> Chosen:
    """From all layers' choice [l, b, t, k] of the tokens here."""
    experts_btlk = jnp.moveaxis(chosen.experts_btlk, 0, 2)
    return chosen._replace(experts_btlk=layout.sequence.own_rows(experts_btlk))


def _block(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, view: Any, i: Any, ctx: Context, bias_e: Any
) -> tuple[jax.Array, Any, Chosen]:
    """Layer i: the stream, the view, and which experts were chosen."""
    low, view = attention_in(p, cfg, x_btd, view, i, ctx)
    q = attention_queries(p, cfg, low, view, ctx)
    x_btd, stats = ffn(p, cfg, attention_out(p, cfg, x_btd, q, view, i, ctx), bias_e, ctx)
    return x_btd, view, Chosen(stats.counts_e, stats.experts_btk)


def _scanned(
    stack: Params, cfg: ModelConfig, x_btd: jax.Array, view: Any, start: int, ctx: Context, bias: Any
) -> Any:
    def body(carry, xs):
        (x, view), (p, bias_e, i) = carry, xs
        *carry, chosen = _block(p, cfg, x, view, i, ctx, bias_e)
        return tuple(carry), chosen

    layers = jnp.arange(start, start + len(stack["attn_norm_d"]))
    (x_btd, view), chosen = lax.scan(body, (x_btd, view), (stack, bias, layers))
    return x_btd, view, chosen


def _one_by_one(
    stack: Params, cfg: ModelConfig, x_btd: jax.Array, view: Any, start: int, ctx: Context, bias: Any
) -> Any:
    @jax.jit  # traced once for all layers
    def block(p: Params, x_btd: jax.Array, view: Any, i: Any, bias_e: Any) -> Any:
        return _block(p, cfg, x_btd, view, i, ctx, bias_e)

    chosen = []
    for i, p in enumerate(stack):
        bias_e = None if bias is None else bias[i]
        x_btd, view, of_layer = block(p, x_btd, view, jnp.int32(start + i), bias_e)
        chosen.append(of_layer)
    return x_btd, view, jax.tree.map(lambda *x: jnp.stack(x), *chosen)


def decode(
    ready: Params,
    cfg: ModelConfig,
    tokens_bt: jax.Array,
    view: Any,
    balance_bias: jax.Array | None,
    layout: Layout,
) -> tuple[jax.Array, Any, Chosen]:
    """t new tokens per sequence. Returns (hidden states after the final norm [b, t, d], the view with their latents, which experts
    they went to).

    ready: from `prepare` with this config. view: of the cache, see `cache.PagedView`. layout: `ONE_DEVICE`, or that of a mesh
    (`parallel/layout.py`): `few_tokens`, or `many_tokens` for prompts, where devices that divide sequences run the rows of
    all of them together, over pages.
    """
    if layout.in_two is not None:
        return layout.in_two(ready, cfg, tokens_bt, view, balance_bias, layout)  # type: ignore[no-any-return]
    x_btd, view, ctx = before_experts(ready, cfg, tokens_bt, view, layout)
    n_moe, dense = cfg.num_moe_layers, cfg.first_k_dense_replace
    nowhere = (0, *x_btd.shape[:2], cfg.num_experts_per_tok)
    chosen = Chosen(jnp.zeros((0, cfg.n_routed_experts), jnp.int32), jnp.zeros(nowhere, jnp.int32))
    if n_moe:
        layers = _one_by_one if unrolled(cfg) else _scanned
        bias_le = None if balance_bias is None else balance_bias[:n_moe]
        x_btd, view, chosen = layers(ready["moe_layers"], cfg, x_btd, view, dense, ctx, bias_le)
    h_btd = final_states(ready, cfg, x_btd, layout)
    return h_btd, layout.sequence.own_view(view), by_token(chosen, layout)


def before_experts(
    ready: Params, cfg: ModelConfig, tokens_bt: jax.Array, view: Any, layout: Layout
) -> tuple[jax.Array, Any, Context]:
    """Embedding and dense layers -> the stream, the view of the rows that the layers see, and what these share."""
    ctx, view = _context(cfg, view, layout)
    x_btd = embed(ready["embed"], cfg, layout.sequence.own(layout.sequence.all_rows(tokens_bt)))
    if cfg.first_k_dense_replace:
        layers = _one_by_one if unrolled(cfg) else _scanned
        x_btd, view, _ = layers(ready["dense_layers"], cfg, x_btd, view, 0, ctx, None)
    return x_btd, view, ctx


def final_states(ready: Params, cfg: ModelConfig, x_btd: jax.Array, layout: Layout) -> jax.Array:
    """Behind the last layer: hidden states after the final norm, of this device's rows."""
    return layout.sequence.own_rows(rms_norm(x_btd, ready["final_norm"]["scale_d"], cfg.rms_norm_eps))


def _context(cfg: ModelConfig, view: Any, layout: Layout) -> tuple[Context, Any]:
    """What the blocks share; and the view of the rows that they see."""
    layout.check()
    view = layout.sequence.all_views(view)
    counted_bt = None if view.counted_bt is None else layout.sequence.own(view.counted_bt)
    return Context(rope_table(cfg, view.positions_bt), layout, counted_bt=counted_bt), view


def mtp_decode(
    ready: Params,
    cfg: ModelConfig,
    h_btd: jax.Array,
    next_tokens_bt: jax.Array,
    view: Any,
    balance_bias: jax.Array | None,
    layout: Layout,
    layer: int = 0,
) -> tuple[jax.Array, Any, jax.Array]:
    """The first MTP module on t positions: hidden states h_i of the main model (after its final norm) and the
    tokens that follow, t_{i+1}. Returns (states after its norm [b, t, d], which predict t_{i+2}; the view of its own
    cache; how many of this device's tokens went to each expert, int32 [e]). layer: of the cache that the view is of, where the module's latents lie."""
    p, sequence = ready["mtp"], layout.sequence
    ctx, view = _context(cfg, view, layout)
    next_btd = embed(ready["embed"], cfg, sequence.own(sequence.all_rows(next_tokens_bt)))
    x_btd = mtp_input(p, cfg, sequence.own_tokens(h_btd), next_btd)
    bias_e = None if balance_bias is None else balance_bias[cfg.num_moe_layers]
    y_btd, view, chosen = _block(p["block"], cfg, x_btd, view, layer, ctx, bias_e)
    h_btd = sequence.own_rows(rms_norm(y_btd, p["norm_d"], cfg.rms_norm_eps))
    return h_btd, sequence.own_view(view), chosen.counts_le


def mtp_append(
    ready: Params, cfg: ModelConfig, h_btd: jax.Array, next_tokens_bt: jax.Array, view: Any, layer: int = 0
) -> Any:
    """The view after `mtp_decode` where nothing is predicted: it costs the module's two projections of t positions."""
    e_btd = embed(ready["embed"], cfg, next_tokens_bt)
    rope = rope_table(cfg, view.positions_bt)
    return view.append(layer, mtp_latents(ready["mtp"], cfg, h_btd, e_btd, rope))

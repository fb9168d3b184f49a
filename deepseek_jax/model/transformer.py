"""DeepSeek-V3: embedding, stack of dense blocks, stack of MoE blocks, final norm, head, MTP modules.

Layers of one kind are stacked on a leading axis and scanned, so compile time does not grow with depth.
`forward` is the pure function; `DeepSeekV3` is the Linen module over it.

Dims: b batch, t token, s cache slot, d hidden, l layer, e routed expert, v vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.cache import LatentCache
from deepseek_jax.model.ffn import SWIGLU_INPUTS, mlp, mlp_params
from deepseek_jax.model.layers import (
    EXPERT_PLAN,
    Params,
    embed,
    embed_params,
    head_params,
    linear,
    logits,
    rms_norm,
)
from deepseek_jax.model.layout import Layout, single_device
from deepseek_jax.model.mla import Expanded, Rope, attend, down, expanded, mla_params
from deepseek_jax.model.moe import at_source, moe_params, with_routed
from deepseek_jax.model.params import Param, declare, stacked
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.router import BalanceStats


def block_params(cfg: ModelConfig, is_moe: bool) -> dict[str, Any]:
    d = cfg.hidden_size
    return {
        "attn_norm_d": Param((d,), ("embed",), "ones"),
        "attn": mla_params(cfg),
        "ffn_norm_d": Param((d,), ("embed",), "ones"),
        "ffn": moe_params(cfg) if is_moe else mlp_params(d, cfg.intermediate_size),
    }


def mtp_params(cfg: ModelConfig) -> dict[str, Any]:
    """One MTP module: two input norms, projection of [embedding; hidden], a MoE block, output norm."""
    d = cfg.hidden_size
    return {
        "enorm_d": Param((d,), ("embed",), "ones"),
        "hnorm_d": Param((d,), ("embed",), "ones"),
        "w_eh_cd": Param((2 * d, d), (None, "embed"), n_in=1),
        "block": block_params(cfg, is_moe=True),
        "norm_d": Param((d,), ("embed",), "ones"),
    }


def model_params(cfg: ModelConfig) -> dict[str, Any]:
    """Every parameter of the model; the router's correction bias is state, not a parameter."""
    tree: dict[str, Any] = {"embed": embed_params(cfg)}
    if cfg.first_k_dense_replace:
        tree["dense_layers"] = stacked(block_params(cfg, False), cfg.first_k_dense_replace)
    if cfg.num_moe_layers:
        tree["moe_layers"] = stacked(block_params(cfg, True), cfg.num_moe_layers)
    tree["final_norm"] = {"scale_d": Param((cfg.hidden_size,), ("embed",), "ones")}
    if not cfg.tie_word_embeddings:
        tree["head"] = head_params(cfg)
    if cfg.num_nextn_predict_layers:
        tree["mtp"] = stacked(mtp_params(cfg), cfg.num_nextn_predict_layers)
    return tree


# --- recomputation (report section 3.2.3) ------------------------------------------------------------------

REMAT = ("none", "deepseek", "full")


def recompute(fn: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """A whole layer `fn` under a named policy: "none" saves what its backward pass reads, "full" saves only its inputs
    and computes it again. The plan of an exchange between experts, where there is one, is made once.

    "deepseek" computes parts of a layer again: RMSNorm (`after_norm`) with what follows from it, as FP8 operands and
    the SwiGLU's output, and the MLA up-projections (`mla.expanded`), so that neither [b, t, h, k] queries and keys nor
    norms are kept. Where the routed experts' backward pass reads the tokens that they got, as on a single device,
    these stay.
    """
    if policy == "full":
        return jax.checkpoint(fn, policy=jax.checkpoint_policies.save_only_these_names(EXPERT_PLAN))
    if policy in REMAT:
        return fn
    raise ValueError(f"remat={policy!r} is not one of {list(REMAT)}")


def in_part(fn: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Under "deepseek", the backward pass of `fn` has only its arguments and what is named SWIGLU_INPUTS, and computes
    the rest again: for parts that begin with a norm."""
    if policy != "deepseek":
        return fn
    return jax.checkpoint(fn, policy=jax.checkpoint_policies.save_only_these_names(SWIGLU_INPUTS))


def after_norm(fn: Callable[..., Any], cfg: ModelConfig, policy: str) -> Callable[..., Any]:
    """(p, scale [d], x) -> fn(p, cfg, RMSNorm of x), of which "deepseek" keeps x."""

    def normed(p: Params, scale_d: jax.Array, x_btd: jax.Array) -> Any:
        return fn(p, cfg, rms_norm(x_btd, scale_d, cfg.rms_norm_eps))

    return in_part(normed, policy)


# --- blocks and stacks -------------------------------------------------------------------------------------


def no_stats(cfg: ModelConfig) -> BalanceStats:
    zero = jnp.zeros((), jnp.float32)
    return BalanceStats(jnp.zeros((cfg.n_routed_experts,), jnp.int32), zero, zero)


class Context(NamedTuple):
    """What all blocks of one pass share; rope and segments are those of all tokens of a sequence.

    counted_bt: which of this device's tokens are routed, and count in loads and balance losses; None for all.
    """

    rope: Rope
    segments_bt: jax.Array | None
    layout: Layout
    with_cache: bool
    counted_bt: jax.Array | None = None


def attention_inputs(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, ctx: Context
) -> tuple[Expanded, LatentCache]:
    """Norm and projections of this device's tokens -> what its heads' core reads of all tokens, and the latents."""
    remat = ctx.layout.remat
    low = after_norm(down, cfg, remat)(p["attn"], p["attn_norm_d"], x_btd)
    return expanded(p["attn"], cfg, ctx.layout.sequence.gathered(low), ctx.rope, remat == "deepseek")


def attention_output(p: Params, cfg: ModelConfig, inputs: Expanded, ctx: Context) -> jax.Array:
    """Core and output projection -> [b, t, d] for this device's tokens."""
    return ctx.layout.sequence.scattered(attend(p["attn"], cfg, inputs, ctx.rope, ctx.segments_bt))


def ffn(
    p: Params,
    cfg: ModelConfig,
    x_btd: jax.Array,
    bias_e: Any,
    layout: Layout,
    counted_bt: jax.Array | None = None,
) -> tuple[jax.Array, BalanceStats]:
    if "gate" not in p["ffn"]:
        dense = after_norm(lambda p, _, h_btd: mlp(p, h_btd), cfg, layout.remat)
        return x_btd + dense(p["ffn"], p["ffn_norm_d"], x_btd), no_stats(cfg)
    at = after_norm(at_source, cfg, layout.remat)(p["ffn"], p["ffn_norm_d"], x_btd)
    y_btd, stats = with_routed(p["ffn"], cfg, at, bias_e, layout.dispatcher, layout.sequence, counted_bt)
    return x_btd + y_btd, stats


def block(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_e: jax.Array | None, ctx: Context
) -> tuple[jax.Array, BalanceStats, LatentCache]:
    """One transformer block: attention, then dense or MoE FFN, each with a pre-norm and a residual."""
    inputs, latent = attention_inputs(p, cfg, x_btd, ctx)
    x_btd = x_btd + attention_output(p, cfg, inputs, ctx)
    y_btd, stats = ffn(p, cfg, x_btd, bias_e, ctx.layout, ctx.counted_bt)
    return y_btd, stats, latent


# Up to this many layers a stack is unrolled: no copies of weight slices, at little compile time.
UNROLL_LAYERS = 4


def unroll(p: Params) -> int:
    """How many layers of a stack one step of its scan takes."""
    n = jax.tree.leaves(p)[0].shape[0]
    return n if n <= UNROLL_LAYERS else 1


def stack(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_le: jax.Array | None, ctx: Context
) -> tuple[jax.Array, BalanceStats, LatentCache | None]:
    """All layers of one kind. Statistics and latents come back stacked on the layer axis."""

    def body(x, layer):
        p_layer, bias_e = layer
        y, stats, latent = block(p_layer, cfg, x, bias_e, ctx)
        return y, (stats, ctx.layout.sequence.cached(latent) if ctx.with_cache else None)

    y_btd, (stats, latent) = lax.scan(
        recompute(body, ctx.layout.remat), x_btd, (p, bias_le), unroll=unroll(p)
    )
    return y_btd, stats, latent


class Aux(NamedTuple):
    """expert_counts_le int32: tokens per MoE layer (main model, then MTP modules) and expert.
    seq_loss, classic_loss: float32, summed over those layers, weights excluded.
    mtp: hidden states [depth, b, t, d] of the MTP modules (inside) or their logits (from the module).
    cache: latents of the main model, stacked [l, b, t, ...], if asked for."""

    expert_counts_le: jax.Array
    seq_loss: jax.Array
    classic_loss: jax.Array
    mtp: jax.Array | None
    cache: LatentCache | None


def mtp_input(
    p: Params, cfg: ModelConfig, h_btd: jax.Array, e_btd: jax.Array, remat: str = "none"
) -> jax.Array:
    """Projection of [normed embedding; normed hidden state] (equation 21)."""

    def projected(p: Params, h_btd: jax.Array, e_btd: jax.Array) -> jax.Array:
        joined = (
            rms_norm(e_btd, p["enorm_d"], cfg.rms_norm_eps),
            rms_norm(h_btd, p["hnorm_d"], cfg.rms_norm_eps),
        )
        return linear(jnp.concatenate(joined, axis=-1), p["w_eh_cd"])

    return in_part(projected, remat)(p, h_btd, e_btd)


def mtp_module(
    p: Params, cfg: ModelConfig, h_btd: jax.Array, e_btd: jax.Array, bias_e: jax.Array | None, ctx: Context
) -> tuple[jax.Array, jax.Array, BalanceStats, LatentCache]:
    """One MTP module: (hidden state for the next depth, the same after its norm, statistics, latents)."""
    x_btd = mtp_input(p, cfg, h_btd, e_btd, ctx.layout.remat)
    y_btd, stats, latent = block(p["block"], cfg, x_btd, bias_e, ctx)
    return y_btd, rms_norm(y_btd, p["norm_d"], cfg.rms_norm_eps), stats, latent


class Inputs(NamedTuple):
    """What a pass reads, int32 [b, t] but the last.

    positions_bt: 0..t-1 by default. segments_bt: tokens of different segments do not see each other; None: all do.
    counted_bt: bool, False for padding, which goes to no routed expert and counts in no load or balance loss; None: all
    tokens count.
    """

    tokens_bt: jax.Array
    positions_bt: jax.Array | None = None
    segments_bt: jax.Array | None = None
    counted_bt: jax.Array | None = None


def _read_ahead(inputs: Inputs, ahead: int) -> jax.Array:
    """At which positions the token `ahead` positions on is one of the same sequence, and document, and both count:
    bool [b, t]."""
    t = inputs.tokens_bt.shape[1]
    there = jnp.broadcast_to(jnp.arange(t) < t - ahead, inputs.tokens_bt.shape)
    if (segments_bt := inputs.segments_bt) is not None:
        there = there & (jnp.roll(segments_bt, -ahead, axis=1) == segments_bt)
    if (counted_bt := inputs.counted_bt) is not None:
        there = there & jnp.roll(counted_bt, -ahead, axis=1) & counted_bt
    return there


def mtp_hidden(
    params: Params, cfg: ModelConfig, h_btd: jax.Array, inputs: Inputs, bias_le: Any, ctx: Context
) -> tuple[jax.Array, BalanceStats]:
    """Hidden states of each MTP module, after its norm [depth, b, t, d] (equations 21-23).

    Module k reads, at position i, the previous depth's hidden state and the embedding of token i + k; the
    embedding comes first in the projection, as in the released weights. `h_btd` is the main model's state
    after its final norm. Positions without a token i + k of their own document, as the last k, are to be ignored:
    they go to no routed expert and count in no load (equation 22 has T - k positions).
    `inputs` are those of whole sequences, `h_btd` those of this device.
    """
    outs, stats, sequence = [], [], ctx.layout.sequence
    for k in range(cfg.num_nextn_predict_layers):
        p = jax.tree.map(lambda x, k=k: x[k], params["mtp"])
        e_btd = embed(params["embed"], cfg, sequence.own(jnp.roll(inputs.tokens_bt, -(k + 1), axis=1)))
        bias_e = None if bias_le is None else bias_le[k]
        counted_bt = sequence.own(_read_ahead(inputs, k + 1))

        def module(p, h, e, bias_e, counted_bt=counted_bt):
            return mtp_module(p, cfg, h, e, bias_e, ctx._replace(counted_bt=counted_bt))[:3]

        h_btd, out, s = recompute(module, ctx.layout.remat)(p, h_btd, e_btd, bias_e)
        outs.append(out)
        stats.append(s)
    return jnp.stack(outs), jax.tree.map(lambda *x: jnp.stack(x), *stats)


def forward(
    params: Params,
    cfg: ModelConfig,
    inputs: Inputs,
    balance_bias: jax.Array | None,
    layout: Layout,
    mtp: bool = True,
    with_cache: bool = False,
) -> tuple[jax.Array, Aux]:
    """Hidden states after the final norm [b, t, d] in the compute dtype, and `Aux`.

    balance_bias: float32 [layer, expert], or None for zeros. Where the layout's sequences are divided
    (`parallel/tensor.py`), `inputs` are those of whole sequences, all results those of this device's tokens. Raises
    ValueError for the layout of another mesh.
    """
    layout.check()
    tokens_bt, positions, sequence = inputs.tokens_bt, inputs.positions_bt, layout.sequence
    if positions is None:
        positions = jnp.arange(tokens_bt.shape[1])[None]
    counted_bt = None if inputs.counted_bt is None else sequence.own(inputs.counted_bt)
    ctx = Context(rope_table(cfg, positions), inputs.segments_bt, layout, with_cache, counted_bt)
    n_moe = cfg.num_moe_layers
    x_btd = embed(params["embed"], cfg, sequence.own(tokens_bt))
    all_stats, caches = [], []
    if cfg.first_k_dense_replace:
        x_btd, _, cache = stack(params["dense_layers"], cfg, x_btd, None, ctx)
        caches.append(cache)
    if n_moe:
        bias = None if balance_bias is None else balance_bias[:n_moe]
        moe_stack = layout.moe_stack or stack
        x_btd, stats, cache = moe_stack(params["moe_layers"], cfg, x_btd, bias, ctx)
        all_stats.append(stats)
        caches.append(cache)
    h_btd = rms_norm(x_btd, params["final_norm"]["scale_d"], cfg.rms_norm_eps)
    hidden = None
    if mtp and cfg.num_nextn_predict_layers:
        bias = None if balance_bias is None else balance_bias[n_moe:]
        hidden, stats = mtp_hidden(params, cfg, h_btd, inputs, bias, ctx)
        all_stats.append(stats)
    cache = jax.tree.map(lambda *x: jnp.concatenate(x), *caches) if with_cache else None
    if not all_stats:
        zero = no_stats(cfg)
        return h_btd, Aux(zero.counts_e[None][:0], zero.seq_loss, zero.classic_loss, hidden, cache)
    total = jax.tree.map(lambda *x: jnp.concatenate(x), *all_stats)
    return h_btd, Aux(total.counts_e, total.seq_loss.sum(), total.classic_loss.sum(), hidden, cache)


class DeepSeekV3(nn.Module):
    """The whole model. `apply({"params": params}, tokens_bt, balance_bias=...) -> (logits_btv, aux)`.

    Logits are float32. `aux.mtp` holds the MTP modules' logits [depth, b, t, v]: depth k at position i
    predicts token i + k + 2 (counting k from 0); its last k + 1 positions are meaningless.
    """

    cfg: ModelConfig
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        tokens_bt: jax.Array,
        balance_bias: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        params = declare(self, model_params(self.cfg), self.cfg.initializer_range)
        inputs = Inputs(tokens_bt, positions, segments)
        h_btd, aux = forward(params, self.cfg, inputs, balance_bias, single_device(self.remat))
        mtp_logits = None if aux.mtp is None else logits(params, aux.mtp)
        return logits(params, h_btd), aux._replace(mtp=mtp_logits)

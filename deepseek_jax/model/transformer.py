"""DeepSeek-V3: embedding, stack of dense blocks, stack of MoE blocks, final norm, MTP modules; the head is in `layers`.

Layers of one kind are stacked on a leading axis and scanned, so compile time does not grow with depth. `forward` is the
whole of them; a pipeline stage is a part: the embedding, layers i to j, the final norm, the MTP modules.

Dims: b batch, t token, d hidden, l layer, e routed expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import block_params, no_stats, stack
from deepseek_jax.model.layers import Params, embed, embed_params, head_params, rms_norm
from deepseek_jax.model.layout import Context, Inputs, Layout
from deepseek_jax.model.mtp import mtp_hidden, mtp_params
from deepseek_jax.model.params import Param, stacked
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.router import BalanceStats


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


# --- parts --------------------------------------------------------------------------------------------------------


def context(cfg: ModelConfig, inputs: Inputs, layout: Layout) -> Context:
    """What all blocks of a pass share. Raises ValueError for the layout of another mesh, and for routes of another shape."""
    layout.check()
    positions = inputs.positions_bt
    if positions is None:
        positions = jnp.arange(inputs.tokens_bt.shape[1])[None]
    counted_bt = None if inputs.counted_bt is None else layout.sequence.own(inputs.counted_bt)
    rope = rope_table(cfg, positions)
    return Context(rope, layout, inputs.segments_bt, counted_bt, _routes(cfg, inputs, layout))


def _routes(cfg: ModelConfig, inputs: Inputs, layout: Layout) -> jax.Array | None:
    """Given experts of this device's tokens, layers first."""
    if inputs.routes_btlk is None:
        return None
    shape = (*inputs.tokens_bt.shape, cfg.num_moe_layers, cfg.num_experts_per_tok)
    if inputs.routes_btlk.shape != shape:
        raise ValueError(
            f"routes have shape {list(inputs.routes_btlk.shape)}; for these tokens it is {list(shape)}: sequences, tokens, MoE "
            "layers of the main model (dense ones have no routes), num_experts_per_tok"
        )
    return jnp.moveaxis(layout.sequence.own(inputs.routes_btlk), 2, 0)


def embedded(params: Params, cfg: ModelConfig, inputs: Inputs, ctx: Context) -> jax.Array:
    """The first part: embeddings [b, t, d] of this device's tokens."""
    return embed(params["embed"], cfg, ctx.layout.sequence.own(inputs.tokens_bt))


def layers(
    params: Params,
    cfg: ModelConfig,
    x_btd: jax.Array,
    balance_bias: jax.Array | None,
    ctx: Context,
    which: range | None = None,
) -> tuple[jax.Array, BalanceStats]:
    """Layers of the main model, all or `which` (consecutive numbers from 0); `params` and bias are those of all. Returns the
    stream and statistics of the MoE layers among them, stacked [l, ...]."""
    dense, which = cfg.first_k_dense_replace, range(cfg.num_hidden_layers) if which is None else which
    empty = jax.tree.map(lambda x: x[None][:0], no_stats(cfg))
    parts = (("dense_layers", 0, dense), ("moe_layers", dense, cfg.num_hidden_layers))
    all_stats = [empty]
    for name, first, end in parts:
        start, stop = max(which.start, first) - first, min(which.stop, end) - first
        if start >= stop:
            continue
        moe = name == "moe_layers"
        p, bias_le = params[name], balance_bias[start:stop] if moe and balance_bias is not None else None
        if stop - start < end - first:
            p = jax.tree.map(lambda w, start=start, stop=stop: w[start:stop], p)
        routes = ctx.routes[start:stop] if moe and ctx.routes is not None else None
        run = ctx.layout.moe_stack or stack if moe else stack
        x_btd, stats = run(p, cfg, x_btd, bias_le, ctx._replace(routes=routes))
        if moe:
            all_stats.append(stats)
    return x_btd, all_stats[-1]


def final_norm(params: Params, cfg: ModelConfig, x_btd: jax.Array) -> jax.Array:
    """The stream after all layers -> hidden states, which head and MTP modules read."""
    return rms_norm(x_btd, params["final_norm"]["scale_d"], cfg.rms_norm_eps)


# --- the whole ----------------------------------------------------------------------------------------------------


class Aux(NamedTuple):
    """expert_counts_le int32: tokens per MoE layer (main model, then MTP modules) and expert.
    seq_loss, classic_loss: float32, summed over those layers, weights excluded.
    mtp: hidden states [depth, b, t, d] of the MTP modules (inside) or their logits (from the module).
    experts_lbtk: int32, the experts that each token went to, best first, in the MoE layers of the main model; of padding,
    n_routed_experts. None where there is no such layer, and over a pipeline."""

    expert_counts_le: jax.Array
    seq_loss: jax.Array
    classic_loss: jax.Array
    mtp: jax.Array | None
    experts_lbtk: jax.Array | None = None


def forward(
    params: Params,
    cfg: ModelConfig,
    inputs: Inputs,
    balance_bias: jax.Array | None,
    layout: Layout,
    mtp: bool = True,
) -> tuple[jax.Array, Aux]:
    """Hidden states after the final norm [b, t, d] in the compute dtype, and `Aux`.

    balance_bias: float32 [layer, expert], or None for zeros. Where the layout's sequences are divided
    (`parallel/tensor.py`), `inputs` are those of whole sequences, all results those of this device's tokens. Raises ValueError for the layout of another
    mesh, and a bias of another shape.
    """
    if balance_bias is not None and jnp.shape(balance_bias) != cfg.balance_bias_shape:
        raise ValueError(
            f"balance_bias has shape {list(jnp.shape(balance_bias))}; this model's is {list(cfg.balance_bias_shape)}: "
            "MoE layers, MTP modules last, by routed experts"
        )
    ctx = context(cfg, inputs, layout)
    x_btd = embedded(params, cfg, inputs, ctx)
    x_btd, stats = layers(params, cfg, x_btd, balance_bias, ctx)
    h_btd, hidden, chosen = final_norm(params, cfg, x_btd), None, stats.experts_btk
    if mtp and cfg.num_nextn_predict_layers:
        bias = None if balance_bias is None else balance_bias[cfg.num_moe_layers :]
        hidden, of_mtp = mtp_hidden(params, cfg, h_btd, inputs, bias, ctx)
        both = (one._replace(experts_btk=None) for one in (stats, of_mtp))
        stats = jax.tree.map(lambda *x: jnp.concatenate(x), *both)
    return h_btd, Aux(stats.counts_e, stats.seq_loss.sum(), stats.classic_loss.sum(), hidden, chosen)

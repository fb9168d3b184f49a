"""A transformer block as a chain of phases: attention in, attention out, then a dense FFN or the phases of `moe.py`.

    attention_in    norm, down-projections, up-projections -> queries, keys, values
    attention_out   attention core and output projection, added to the stream
    gate            norm, affinities, the routing, where each token's rows go
    dispatch        tokens to the devices of their experts
    shared          the shared experts, added to the stream
    experts         the routed experts, on the rows that came
    combine         their sums to the tokens, added to the stream

Each phase is a pure function and says itself what it computes again (`recompute.py`). `block` runs them in this order;
`parallel/overlap.py` those of two micro-batches in turns; `decoding.py` with an attention over the cache.

Dims: b batch, t token, d hidden, l layer, e routed expert.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.ffn import mlp, mlp_params
from deepseek_jax.model.layers import Params
from deepseek_jax.model.layout import Context
from deepseek_jax.model.mla import Expanded, attend, down, expanded, mla_params
from deepseek_jax.model.moe import moe, moe_params
from deepseek_jax.model.params import Param
from deepseek_jax.model.recompute import after_norm, recompute
from deepseek_jax.model.router import BalanceStats


def block_params(cfg: ModelConfig, is_moe: bool) -> dict[str, Any]:
    d = cfg.hidden_size
    return {
        "attn_norm_d": Param((d,), ("embed",), "ones"),
        "attn": mla_params(cfg),
        "ffn_norm_d": Param((d,), ("embed",), "ones"),
        "ffn": moe_params(cfg) if is_moe else mlp_params(d, cfg.intermediate_size),
    }


def attention_in(p: Params, cfg: ModelConfig, x_btd: jax.Array, ctx: Context) -> Expanded:
    """Norm and projections of this device's tokens -> what its heads' core reads of all tokens."""
    remat = ctx.layout.remat
    low = after_norm(down, cfg, remat)(p["attn"], p["attn_norm_d"], x_btd)
    low = ctx.layout.sequence.gathered(low)
    return expanded(p["attn"], cfg, low, ctx.rope, remat == "deepseek")


def attention_out(p: Params, cfg: ModelConfig, x_btd: jax.Array, inputs: Expanded, ctx: Context) -> jax.Array:
    """x plus core and output projection for this device's tokens."""
    y_btd = attend(p["attn"], cfg, inputs, ctx.rope, ctx.segments_bt)
    return x_btd + ctx.layout.sequence.scattered(y_btd)


def ffn(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_e: jax.Array | None, ctx: Context
) -> tuple[jax.Array, BalanceStats]:
    """x plus the FFN of a dense or MoE block."""
    if "gate" in p["ffn"]:
        return moe(p, cfg, x_btd, bias_e, ctx)
    dense = after_norm(lambda p, _, h_btd: mlp(p, h_btd), cfg, ctx.layout.remat)
    return x_btd + dense(p["ffn"], p["ffn_norm_d"], x_btd), no_stats(cfg)


def no_stats(cfg: ModelConfig) -> BalanceStats:
    zero = jnp.zeros((), jnp.float32)
    return BalanceStats(jnp.zeros((cfg.n_routed_experts,), jnp.int32), zero, zero)


def block(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_e: jax.Array | None, ctx: Context
) -> tuple[jax.Array, BalanceStats]:
    """One transformer block: attention, then dense or MoE FFN, each with a pre-norm and a residual."""
    x_btd = attention_out(p, cfg, x_btd, attention_in(p, cfg, x_btd, ctx), ctx)
    return ffn(p, cfg, x_btd, bias_e, ctx)


# --- layers of one kind -------------------------------------------------------------------------------------------

# Up to this many layers a stack is unrolled: no copies of weight slices, at little compile time.
UNROLL_LAYERS = 4


def unroll(p: Params) -> int:
    """How many layers of a stack one step of its scan takes."""
    n = jax.tree.leaves(p)[0].shape[0]
    return n if n <= UNROLL_LAYERS else 1


def stack(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_le: jax.Array | None, ctx: Context
) -> tuple[jax.Array, BalanceStats]:
    """Layers of one kind, stacked on a leading axis, with their experts in `ctx.routes` if they are given. Statistics come back
    stacked likewise."""

    def body(x, layer):
        p_layer, bias_e, routes_btk = layer
        return block(p_layer, cfg, x, bias_e, ctx._replace(routes=routes_btk))

    return lax.scan(recompute(body, ctx.layout.remat), x_btd, (p, bias_le, ctx.routes), unroll=unroll(p))

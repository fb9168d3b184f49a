"""Multi-Token Prediction (report section 2.2): modules that predict one token further each, for training and drafts.

Dims: b batch, t token, d hidden, l MTP module.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import block, block_params
from deepseek_jax.model.cache import LatentCache
from deepseek_jax.model.layers import Params, embed, linear, rms_norm
from deepseek_jax.model.layout import Context, Inputs
from deepseek_jax.model.mla import Rope, down, latents
from deepseek_jax.model.params import Param
from deepseek_jax.model.recompute import in_part, recompute
from deepseek_jax.model.router import BalanceStats


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


def mtp_latents(p: Params, cfg: ModelConfig, h_btd: jax.Array, e_btd: jax.Array, rope: Rope) -> LatentCache:
    """What a module's attention keeps of positions whose state, and the embedding of whose next token, are known. It is one
    block: nothing before them, and none of its experts, is needed for it."""
    x_btd = rms_norm(mtp_input(p, cfg, h_btd, e_btd), p["block"]["attn_norm_d"], cfg.rms_norm_eps)
    attn = p["block"]["attn"]
    return latents(attn, cfg, down(attn, cfg, x_btd), rope)


def mtp_module(
    p: Params, cfg: ModelConfig, h_btd: jax.Array, e_btd: jax.Array, bias_e: jax.Array | None, ctx: Context
) -> tuple[jax.Array, jax.Array, BalanceStats]:
    """One MTP module: (hidden state for the next depth, the same after its norm, statistics)."""
    x_btd = mtp_input(p, cfg, h_btd, e_btd, ctx.layout.remat)
    y_btd, stats = block(p["block"], cfg, x_btd, bias_e, ctx)
    return y_btd, rms_norm(y_btd, p["norm_d"], cfg.rms_norm_eps), stats


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
    outs, stats, sequence, embedding = [], [], ctx.layout.sequence, params["embed"]
    if ctx.layout.detached_mtp:
        h_btd, embedding = jax.lax.stop_gradient((h_btd, embedding))
    for k in range(cfg.num_nextn_predict_layers):
        p = jax.tree.map(lambda x, k=k: x[k], params["mtp"])
        e_btd = embed(embedding, cfg, sequence.own(jnp.roll(inputs.tokens_bt, -(k + 1), axis=1)))
        bias_e = None if bias_le is None else bias_le[k]
        counted_bt = sequence.own(_read_ahead(inputs, k + 1))

        def module(p, h, e, bias_e, counted_bt=counted_bt):
            return mtp_module(p, cfg, h, e, bias_e, ctx._replace(counted_bt=counted_bt, routes=None))

        h_btd, out, s = recompute(module, ctx.layout.remat)(p, h_btd, e_btd, bias_e)
        outs.append(out)
        stats.append(s)
    return jnp.stack(outs), jax.tree.map(lambda *x: jnp.stack(x), *stats)

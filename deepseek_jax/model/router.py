"""Gate, group-limited top-k, auxiliary-loss-free bias update and balance losses (report section 2.1.2).

Experts are *selected* by affinity plus correction bias and *weighted* by the affinity alone. A group's score
is the sum of its two best biased affinities (V3) or their maximum (V2, softmax, no bias); groups that are
not kept are masked with -inf, because with negative biases a mask of 0 would win.

Dims: b batch, t token, d hidden, e routed expert, k selected expert, g group, l layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import Params, linear
from deepseek_jax.model.params import Param
from deepseek_jax.model.sequence import WHOLE, Whole


class Routing(NamedTuple):
    """experts_btk: int32 ids; weights_btk: float32 gating values, routed_scaling_factor included."""

    experts_btk: jax.Array
    weights_btk: jax.Array


class BalanceStats(NamedTuple):
    """One layer's load, tokens per expert (int32 [e]), and its two balance losses (float32, weight excluded); of a MoE layer the
    experts that each token goes to, int32 [b, t, k]."""

    counts_e: jax.Array
    seq_loss: jax.Array
    classic_loss: jax.Array
    experts_btk: jax.Array | None = None


def gate_params(cfg: ModelConfig) -> dict[str, Param]:
    return {"w_gate_de": Param((cfg.hidden_size, cfg.n_routed_experts), ("embed", None))}


def affinities(p: Params, cfg: ModelConfig, x_btd: jax.Array) -> jax.Array:
    """Token-to-expert affinities in float32 [b, t, e] (equation 15; softmax for V2)."""
    logits_bte = linear(x_btd, p["w_gate_de"], dtype=jnp.float32)
    if cfg.scoring_func == "sigmoid":
        return jax.nn.sigmoid(logits_bte)
    return jax.nn.softmax(logits_bte, axis=-1)


def _limit_groups(choice: jax.Array, cfg: ModelConfig, biased: bool) -> jax.Array:
    """Scores with all experts outside the `topk_group` best groups at -inf."""
    if cfg.topk_group == cfg.n_group:
        return choice
    grouped = choice.reshape(*choice.shape[:-1], cfg.n_group, -1)
    best = min(2, grouped.shape[-1]) if biased else 1
    score_btg = jax.lax.top_k(grouped, best)[0].sum(-1)
    _, kept = jax.lax.top_k(score_btg, cfg.topk_group)
    keep_btg = jax.nn.one_hot(kept, cfg.n_group, dtype=bool).any(-2)
    return jnp.where(keep_btg[..., None], grouped, -jnp.inf).reshape(choice.shape)


def route(
    cfg: ModelConfig, s_bte: jax.Array, bias_e: jax.Array | None, given_btk: jax.Array | None = None
) -> Routing:
    """Top-k experts of each token and their gating values (equations 13, 14, 16).

    `bias_e` (float32) shifts the selection only; it must be None or zero for softmax gating. given_btk: experts that were
    chosen in another pass, integers in the order of that choice; where the first is negative, none were. Gating values
    are of the affinities at hand, through which the gate gets its gradient.
    """
    experts = _chosen(cfg, s_bte, bias_e)
    if given_btk is not None:
        experts = jnp.where(given_btk[..., :1] < 0, experts, given_btk.astype(jnp.int32))
    weights = jnp.take_along_axis(s_bte, experts, axis=-1)
    if cfg.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Routing(experts, weights * cfg.routed_scaling_factor)


def _chosen(cfg: ModelConfig, s_bte: jax.Array, bias_e: jax.Array | None) -> jax.Array:
    """The k best experts of each token, int32 [b, t, k], best first."""
    choice = jax.lax.stop_gradient(s_bte)
    if cfg.has_balance_bias and bias_e is not None:
        choice = choice + jnp.broadcast_to(jax.lax.stop_gradient(bias_e), choice.shape)
    choice = _limit_groups(choice, cfg, cfg.has_balance_bias)
    return jax.lax.top_k(choice, cfg.num_experts_per_tok)[1].astype(jnp.int32)


def expert_counts(experts: jax.Array, n_experts: int) -> jax.Array:
    """How often each expert occurs in `experts` (any shape) -> int32 [e]; ids outside [0, e) are ignored."""
    return jnp.zeros((n_experts,), jnp.int32).at[experts.reshape(-1)].add(1, mode="drop")


def only_counted(cfg: ModelConfig, routing: Routing, counted_bt: jax.Array | None) -> Routing:
    """The routing of tokens that count; the experts of others are absent (id n_routed_experts). None: all count."""
    if counted_bt is None:
        return routing
    present = jnp.where(counted_bt[..., None], routing.experts_btk, cfg.n_routed_experts)
    return routing._replace(experts_btk=present)


def balance_stats(
    cfg: ModelConfig,
    s_bte: jax.Array,
    routing: Routing,
    sequence: Whole = WHOLE,
    counted_bt: jax.Array | None = None,
) -> BalanceStats:
    """Load and balance losses of one layer; of divided sequences, what this device's tokens add to each.

    The sequence-wise loss (equations 17-20) is per sequence, then averaged over b; its f uses the plain
    top-k of the unbiased affinities, as equation 18 says. The classic loss takes the experts really
    selected, over all b x t tokens at hand. Both are 1 under perfect balance. `counted_bt` (bool): tokens that are
    part of no load and no loss have False.
    """
    (b, own, e), k = s_bte.shape, cfg.num_experts_per_tok
    share_bte = s_bte / (s_bte.sum(-1, keepdims=True) + 1e-20)
    _, top = jax.lax.top_k(jax.lax.stop_gradient(s_bte), k)
    t_b1 = jnp.full((b, 1), own * sequence.parts, jnp.float32)  # tokens of each sequence
    t = t_b1.sum()
    if counted_bt is not None:
        share_bte = jnp.where(counted_bt[..., None], share_bte, 0.0)
        top = jnp.where(counted_bt[..., None], top, e)
        there_b1 = sequence.total(counted_bt.sum(1, keepdims=True))
        t_b1, t = (jnp.maximum(n, 1).astype(jnp.float32) for n in (there_b1, there_b1.sum()))
    hits_be = jax.vmap(lambda ids: expert_counts(ids, e))(top)
    f_be = sequence.total(hits_be).astype(jnp.float32) * (e / (k * t_b1))
    seq_loss = (f_be * share_bte.sum(1) / t_b1).sum(-1).mean()
    counts_e = expert_counts(routing.experts_btk, e)
    f_e = sequence.total(counts_e).astype(jnp.float32) * (e / (k * t))
    classic_loss = (f_e * share_bte.sum((0, 1))).sum() / t
    return BalanceStats(counts_e, seq_loss, classic_loss, routing.experts_btk)


def update_bias(bias_le: jax.Array, counts_le: jax.Array, gamma: jax.Array | float) -> jax.Array:
    """Move each bias by gamma against the sign of its overload (section 2.1.2); integers, so exact.

    counts_le int32: load over the whole global batch; an expert exactly at the mean keeps its bias. The mean is taken
    as quotient and remainder of each count: neither their sum nor a count times e has to fit into an int32.
    """
    e = counts_le.shape[-1]
    left_l1 = (counts_le % e).sum(-1, keepdims=True)
    mean_l1, fraction_l1 = (counts_le // e).sum(-1, keepdims=True) + left_l1 // e, left_l1 % e
    over_le = jnp.where(counts_le == mean_l1, -jnp.sign(fraction_l1), jnp.sign(counts_le - mean_l1))
    return bias_le - gamma * over_le.astype(bias_le.dtype)

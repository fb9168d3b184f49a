"""DeepSeekMoE layer as phases: shared experts for every token, routed experts by the gate (equations 12-16).

The layout's dispatcher (`dispatch.py`) brings tokens to their routed experts and the sums back, on one device or over a
mesh; between its calls a caller may do other work (`parallel/overlap.py`). Where experts have copies, or move, a layer's
parameters hold their `placement` beside their weights. The shared expert may be one more routed one, the last, which every token
chooses with weight 1 (section 3.4.2): the placement then has one expert more than the gate, and none is apart.

Dims: b batch, t token, n = b * t, d hidden, e routed expert, k selected expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.experts import expert_params
from deepseek_jax.model.ffn import mlp, mlp_params
from deepseek_jax.model.layers import Params
from deepseek_jax.model.layout import Context
from deepseek_jax.model.recompute import after_norm
from deepseek_jax.model.router import (
    BalanceStats,
    Routing,
    affinities,
    balance_stats,
    gate_params,
    only_counted,
    route,
)
from deepseek_jax.precision.product import product


def moe_params(cfg: ModelConfig) -> dict[str, Any]:
    tree: dict[str, Any] = {"gate": gate_params(cfg), "experts": expert_params(cfg)}
    if cfg.n_shared_experts:
        tree["shared"] = mlp_params(cfg.hidden_size, cfg.n_shared_experts * cfg.moe_intermediate_size)
    return tree


def _flat(x_btx: jax.Array) -> jax.Array:
    return x_btx.reshape(-1, x_btx.shape[-1])


class Routed(NamedTuple):
    """Tokens after the gate. h_btd: normed, to be dispatched; s_bte: affinities; routing: by the gate; plan: of the dispatcher.
    weights_btk: of all experts that a token goes to, the shared one included where that is routed."""

    h_btd: jax.Array
    s_bte: jax.Array
    routing: Routing
    plan: Any
    weights_btk: jax.Array

    @property
    def values(self) -> tuple[jax.Array, jax.Array]:
        """What a dispatch brings to the experts: tokens [n, d] and routing weights [n, k]."""
        return _flat(self.h_btd), _flat(self.weights_btk)


class AtExperts(NamedTuple):
    """Tokens after their dispatch: the stream, normed tokens and routing weights as they are here, and what
    the dispatcher received."""

    x_btd: jax.Array
    h_btd: jax.Array
    weights_nk: jax.Array
    plan: Any
    received: Any


def gate(p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_e: jax.Array | None, ctx: Context) -> Routed:
    """Norm, affinities and routing. Tokens that do not count go to no routed expert."""

    def scored(p: Params, cfg: ModelConfig, h_btd: jax.Array) -> tuple[jax.Array, jax.Array]:
        return h_btd, affinities(p, cfg, h_btd)

    h_btd, s_bte = after_norm(scored, cfg, ctx.layout.remat)(p["ffn"]["gate"], p["ffn_norm_d"], x_btd)
    routing = only_counted(cfg, route(cfg, s_bte, bias_e, ctx.routes), ctx.counted_bt)
    n_local = product(p["ffn"]["experts"]["w_down_efd"]).experts
    placement = p["ffn"].get("placement")
    shared_too = placement is not None and len(placement.count_e) > cfg.n_routed_experts
    to = with_shared(cfg, routing) if shared_too else routing
    plan = ctx.layout.dispatcher.plan(_flat(to.experts_btk), n_local, placement)
    return Routed(h_btd, s_bte, routing, plan, to.weights_btk)


def with_shared(cfg: ModelConfig, routing: Routing) -> Routing:
    """Every token goes to the shared expert, too, with weight 1, where that is one more routed expert (report section 3.4.2), the
    last; absent experts have id -1."""
    there_btk = routing.experts_btk < cfg.n_routed_experts
    own = jnp.where(there_btk, routing.experts_btk, -1), routing.weights_btk
    shared_bt1 = jnp.where(there_btk[..., :1], cfg.n_routed_experts, -1)
    more = shared_bt1, jnp.ones(shared_bt1.shape, routing.weights_btk.dtype)
    return Routing(*(jnp.concatenate(pair, axis=-1) for pair in zip(own, more, strict=True)))


def shared(p: Params, cfg: ModelConfig, at: AtExperts, ctx: Context) -> jax.Array:
    """x [b, t, d] plus the shared experts, where there are any."""
    if "shared" not in p["ffn"]:
        return at.x_btd
    if ctx.layout.remat == "deepseek":  # from the norm's input, which is kept
        again = after_norm(lambda p, _, h_btd: mlp(p, h_btd), cfg, "deepseek")
        return at.x_btd + again(p["ffn"]["shared"], p["ffn_norm_d"], at.x_btd)
    return at.x_btd + mlp(p["ffn"]["shared"], at.h_btd)


def experts(p: Params, at: AtExperts, ctx: Context) -> Any:
    """This device's routed experts on the rows received -> what the dispatcher's combine takes."""
    h_nd = _flat(at.h_btd)
    return ctx.layout.dispatcher.experts(p["ffn"]["experts"], at.received, h_nd, at.weights_nk, at.plan)


def moe(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_e: jax.Array | None, ctx: Context
) -> tuple[jax.Array, BalanceStats]:
    """The phases in their order -> (x plus shared and routed experts, load and balance losses of this layer)."""
    dispatcher, to = ctx.layout.dispatcher, gate(p, cfg, x_btd, bias_e, ctx)
    h_nd, weights_nk = to.values
    with jax.named_scope("dispatch"):
        received = dispatcher.dispatch(h_nd, weights_nk, to.plan)
    at = AtExperts(x_btd, to.h_btd, weights_nk, to.plan, received)
    x_btd, y = shared(p, cfg, at, ctx), experts(p, at, ctx)
    with jax.named_scope("combine"):
        x_btd = x_btd + dispatcher.combine(y, to.plan).reshape(x_btd.shape)
    return x_btd, balance_stats(cfg, to.s_bte, to.routing, ctx.layout.sequence, ctx.counted_bt)

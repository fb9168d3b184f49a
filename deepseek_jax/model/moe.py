"""DeepSeekMoE layer: shared experts for every token, routed experts by the gate (equations 12-16).

The routed computation is an argument (`experts`), so that the same layer runs on one device
(`experts.routed_experts`), while decoding (`experts.decode_experts`) and over a mesh.

Dims: b batch, t token, d hidden, e routed expert, k selected expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.experts import expert_params, routed_experts
from deepseek_jax.model.ffn import mlp, mlp_params
from deepseek_jax.model.layers import Params
from deepseek_jax.model.params import declare
from deepseek_jax.model.router import (
    BalanceStats,
    affinities,
    balance_stats,
    gate_params,
    only_counted,
    route,
)
from deepseek_jax.model.sequence import WHOLE, Whole

# (expert params, x [n, d], expert ids [n, k], weights [n, k]) -> [n, d]
Experts = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


def moe_params(cfg: ModelConfig) -> dict[str, Any]:
    tree: dict[str, Any] = {"gate": gate_params(cfg), "experts": expert_params(cfg)}
    if cfg.n_shared_experts:
        tree["shared"] = mlp_params(cfg.hidden_size, cfg.n_shared_experts * cfg.moe_intermediate_size)
    return tree


class AtSource(NamedTuple):
    """What a token's own device makes of it."""

    s_bte: jax.Array  # affinities
    x_btd: jax.Array  # to be dispatched
    shared_btd: jax.Array | None  # result of the shared experts, where there are any


def at_source(p: Params, cfg: ModelConfig, x_btd: jax.Array) -> AtSource:
    shared_btd = mlp(p["shared"], x_btd) if "shared" in p else None
    return AtSource(affinities(p["gate"], cfg, x_btd), x_btd, shared_btd)


def with_routed(
    p: Params,
    cfg: ModelConfig,
    at: AtSource,
    bias_e: jax.Array | None,
    experts: Experts,
    sequence: Whole,
    counted_bt: jax.Array | None = None,
) -> tuple[jax.Array, BalanceStats]:
    """Results of `moe`, from `at_source`. Tokens that do not count (`counted_bt` False) go to no routed expert."""
    routing = only_counted(cfg, route(cfg, at.s_bte, bias_e), counted_bt)
    ids_nk, weights_nk = (x.reshape(-1, x.shape[-1]) for x in routing)
    y = experts(p["experts"], at.x_btd.reshape(-1, at.x_btd.shape[-1]), ids_nk, weights_nk)
    y_btd = y.reshape(at.x_btd.shape)
    if at.shared_btd is not None:
        y_btd = y_btd + at.shared_btd
    return y_btd, balance_stats(cfg, at.s_bte, routing, sequence, counted_bt)


def moe(
    p: Params,
    cfg: ModelConfig,
    x_btd: jax.Array,
    bias_e: jax.Array | None = None,
    experts: Experts = routed_experts,
    sequence: Whole = WHOLE,
) -> tuple[jax.Array, BalanceStats]:
    """Shared plus routed experts -> ([b, t, d], load and balance losses of this layer)."""
    return with_routed(p, cfg, at_source(p, cfg, x_btd), bias_e, experts, sequence)


class DeepSeekMoE(nn.Module):
    """The MoE layer over [b, t, d] as a module of its own (study, notebooks): returns (y, BalanceStats)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, bias_e: jax.Array | None = None) -> Any:
        p = declare(self, moe_params(self.cfg), self.cfg.initializer_range)
        if bias_e is None and self.cfg.has_balance_bias:
            bias_e = jnp.zeros((self.cfg.n_routed_experts,), jnp.float32)
        return moe(p, self.cfg, x_btd, bias_e)

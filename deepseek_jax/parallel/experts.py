"""Routed experts over a mesh: the single device's function of `model/experts.py`, each device holding its share.

To be called inside `shard_map` (check_vma=False) with expert parameters sharded over (node, local, tensor) in order,
so that the device j of node i holds the experts of rank i * (devices of a node) + j, where j counts the devices of a
node along local, then tensor. Every device brings its own tokens and gets their sums back. Nothing the shared expert
needs goes through the exchange, so XLA is free to compute it while tokens travel.

Node-limited routing (section 2.1.2) works on the mesh's nodes through this placement: a group of experts lies on
consecutive devices. Groups need not be nodes; `nodes_per_token` says how many nodes a token can meet.

Dims: n token of this device, r row received, s row sent, d hidden, k selected expert, e expert of this device.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.layers import EXPERT_PLAN, Params
from deepseek_jax.model.moe import Experts
from deepseek_jax.parallel.exchange import (
    AS_IT_IS,
    FLAT,
    TWO_HOP,
    Exchange,
    Plan,
    Received,
    combine,
    dispatch,
    make_plan,
)
from deepseek_jax.parallel.mesh import expert_exchange
from deepseek_jax.parallel.rounds import Way, in_rounds, received
from deepseek_jax.parallel.wire import Wire

MODES = {"flat": FLAT, "two_hop": TWO_HOP}


def nodes_per_token(model: ModelConfig, nodes: int) -> int:
    """On how many of `nodes` the experts of one token lie at most, by the group limit."""
    if model.n_routed_experts % nodes:
        raise ValueError(f"n_routed_experts={model.n_routed_experts} do not divide over {nodes} nodes")
    group, node = model.n_routed_experts // model.n_group, model.n_routed_experts // nodes
    spans = sorted(((g + 1) * group - 1) // node - g * group // node + 1 for g in range(model.n_group))
    return min(nodes, model.num_experts_per_tok, sum(spans[-model.topk_group :]))


def mesh_experts(
    mode: str = "two_hop",
    *,
    local: Experts = routed_experts,
    wire: Wire = AS_IT_IS,
    most: int | None = None,
    capacity: float | None = None,
    implementation: str | None = None,
) -> "MeshExperts":
    """The `experts` argument of the model's forward pass, for use inside `shard_map`.

    Args:
      mode: "two_hop" (between nodes, then inside) or "flat" (both at once).
      local: the computation of one device's experts; ids of absent experts are -1.
      wire: formats of dispatch and combine; by default arrays as they are.
      most: on how many peers of the first hop a token's experts lie at most: `nodes_per_token` for "two_hop"
        (None: any number). A token with more gets NaN.
      capacity: None makes buffers for the worst routing; a number bounds what the last hop brings, and the experts'
        work on it, to `capacity` x n rows at a time, as often as the most loaded device needs (k or more, with
        balanced routing: once). Nothing is dropped. The backward pass brings the rows again instead of keeping
        them. A first hop's rows, at most nodes x n, are not bounded.
      implementation: of the collective, see `exchange.Exchange`.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {list(MODES)}")
    if capacity is not None and capacity <= 0:
        raise ValueError(f"capacity={capacity} must be positive, or None for buffers without bound")
    return MeshExperts(Exchange(MODES[mode], wire, implementation), _of_present(local), most, capacity)


def experts_over(
    model: ModelConfig,
    cfg: MeshConfig,
    mesh: Mesh | AbstractMesh,
    wire: Wire = AS_IT_IS,
    local: Experts = routed_experts,
) -> Experts:
    """The routed experts of a forward pass inside `shard_map`, spread as `cfg` says: `local` itself where they are not.

    wire: the formats that `mesh.dispatch` and `mesh.combine` leave open ("auto").
    """
    mode = expert_exchange(cfg, mesh)
    if mode == "replicated" or not model.n_routed_experts:
        return local
    return mesh_experts(
        mode,
        local=local,
        wire=named_wire(cfg, wire),
        most=nodes_per_token(model, mesh.shape["node"]) if mode == "two_hop" else None,
        capacity=cfg.receive or None,
    )


def named_wire(cfg: MeshConfig, default: Wire) -> Wire:
    """The formats of an exchange: what the config names, else the default's."""
    named = {name: getattr(cfg, name) for name in ("dispatch", "combine")}
    return dataclasses.replace(default, **{name: form for name, form in named.items() if form != "auto"})


@dataclasses.dataclass(frozen=True)
class MeshExperts:
    """See `mesh_experts`. Called, it is an `Experts`; the methods are its parts, for a caller with work to do while
    tokens travel (`overlap.py`)."""

    ex: Exchange
    present: Experts
    most: int | None
    capacity: float | None

    def __call__(self, p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
        plan = self.plan(p, experts_nk)
        rows = self.buffer(len(x_nd), plan)
        if rows is not None:
            return fitting(in_rounds(p, x_nd, weights_nk, plan, Way(self.ex, self.present, rows)), plan)
        with jax.named_scope("dispatch"):
            came = dispatch(x_nd, weights_nk, plan, self.ex)
        y_rd = self.present(p, came.tokens(p, self.ex), plan.experts_rk, came.weights_rk)
        with jax.named_scope("combine"):
            return fitting(combine(y_rd, plan, self.ex), plan)

    def plan(self, p: Params, experts_nk: jax.Array) -> Plan:
        with jax.named_scope("plan"):
            plan = make_plan(self.ex, experts_nk, p["w_gate_edf"].shape[0], self.most)
        return jax.tree.map(lambda a: checkpoint_name(a, EXPERT_PLAN), plan)

    def buffer(self, n: int, plan: Plan) -> int | None:
        """Rows received at once for n tokens, or None where that is all there can be."""
        if self.capacity is None:
            return None
        rows = math.ceil(self.capacity * n)
        return rows if rows < plan.hops[-1].rows else None

    def received(
        self,
        p: Params,
        came: Received,
        x_nd: jax.Array,
        weights_nk: jax.Array,
        plan: Plan,
    ) -> tuple[jax.Array, jax.Array]:
        """This device's experts on the first buffer of rows [r, d], whose combine is to come; and what all rows beyond
        it add to the tokens [n, d], there and back: with balanced routing there are none."""
        rows = self.buffer(len(x_nd), plan)
        if rows is None:
            y_rd = self.present(p, came.tokens(p, self.ex), plan.experts_rk, came.weights_rk)
            return y_rd, jnp.zeros_like(x_nd)
        return received(p, came, x_nd, weights_nk, plan, Way(self.ex, self.present, rows))


def fitting(y_nd: jax.Array, plan: Plan) -> jax.Array:
    """NaN for tokens of more peers than the plan was told of. A sum, which saves no mask of the size of y."""
    return y_nd + jnp.where(plan.fits_n, 0, jnp.nan).astype(y_nd.dtype)[:, None]


def _of_present(local: Experts) -> Experts:
    """`local` on at most e of the k columns: a row meets no more experts than there are, the others are absent."""

    def narrow(p: Params, x_rd: Any, experts_rk: jax.Array, weights_rk: jax.Array) -> jax.Array:
        e, k = p["w_gate_edf"].shape[0], experts_rk.shape[1]
        if e < k:
            _, column = lax.top_k((experts_rk >= 0).astype(jnp.int32), e)
            experts_rk = jnp.take_along_axis(experts_rk, column, axis=1)
            weights_rk = jnp.take_along_axis(weights_rk, column, axis=1)
        return local(p, x_rd, experts_rk, weights_rk)

    return narrow

"""Which device holds which expert: from the experts that the gate selects to those that devices hold.

Experts lie in order over the mesh axes (node, local, tensor), n_local on each device. In training, the gate's experts
are these. In serving, an expert with much load can have several replicas (report section 3.4.1): then the gate's
(logical) ids become physical ones before a layout is planned, and nothing after knows of it.

Node-limited routing (section 2.1.2) works on the mesh's nodes through this order: a group of experts lies on
consecutive devices. Groups need not be nodes; `nodes_per_token` says how many nodes a token can meet.

Dims: n token, k selected expert, e logical expert, c replica of an expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.rows import sort_rows


class Placement(NamedTuple):
    """Physical ids of the replicas of each expert, the first `count_e` of each row; int32. See `balancing`."""

    physical_ec: jax.Array
    count_e: jax.Array

    def physical(self, experts_nk: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        """Logical -> physical ids; absent ones (outside of [0, e)) are -1.

        The tokens of an expert go to its replicas in turn, in the order of the tokens, from replica `first` on: of m
        tokens on one device each replica gets m / count, rounded up or down.
        """
        e = len(self.count_e)
        place = sort_rows(experts_nk, jnp.zeros(experts_nk.shape), e, alignment=1)
        there = (experts_nk >= 0) & (experts_nk < e)
        expert_nk = jnp.where(there, experts_nk, 0)
        turn_nk = place.row_nk - (jnp.cumsum(place.sizes_e) - place.sizes_e)[expert_nk] + first
        return jnp.where(there, self.physical_ec[expert_nk, turn_nk % self.count_e[expert_nk]], -1)


def nodes_per_token(model: ModelConfig, nodes: int) -> int:
    """On how many of `nodes` the experts of one token lie at most, by the group limit; without replicas."""
    if model.n_routed_experts % nodes:
        raise ValueError(f"n_routed_experts={model.n_routed_experts} do not divide over {nodes} nodes")
    group, node = model.n_routed_experts // model.n_group, model.n_routed_experts // nodes
    spans = sorted(((g + 1) * group - 1) // node - g * group // node + 1 for g in range(model.n_group))
    return min(nodes, model.num_experts_per_tok, sum(spans[-model.topk_group :]))

"""How a training run lies on its mesh: what of the state each device holds, and how it reaches the experts.

Experts are spread over node x local x tensor as `mesh.experts` says (report section 3.2.2), the attention's heads over
tensor. Everything else is whole on every device while it computes, and between steps too unless `mesh.zero` divides
parameters and moments (`parallel/zero.py`).
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from deepseek_jax.config import Config
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.moe import Experts
from deepseek_jax.model.transformer import Stack, model_params, stack
from deepseek_jax.parallel.experts import MeshExperts
from deepseek_jax.parallel.experts import experts_over as spread_experts
from deepseek_jax.parallel.mesh import replicated, rules
from deepseek_jax.parallel.overlap import overlapped
from deepseek_jax.parallel.wire import Wire
from deepseek_jax.parallel.zero import shares
from deepseek_jax.precision import preset
from deepseek_jax.training.optimizer import AdamWState
from deepseek_jax.training.state import TrainState


def parameter_shares(cfg: Config, mesh: Mesh | AbstractMesh) -> Any:
    """`zero.Share` of every parameter. Raises ValueError, with names and numbers, for what does not divide."""
    table, quantised = rules(cfg.mesh, mesh), preset(cfg.precision) is not None
    return shares(model_params(cfg.model), mesh, table, cfg.model.dtype, quantised, cfg.mesh.zero)


def state_shardings(cfg: Config, mesh: Mesh | AbstractMesh) -> Any:
    """A `TrainState` of shardings: the moments lie where their parameters are, the rest is everywhere."""
    params = jax.tree.map(lambda share: NamedSharding(mesh, share.held), parameter_shares(cfg, mesh))
    whole: Any = replicated(mesh)
    return TrainState(whole, params, AdamWState(whole, params, params), whole, whole, whole)


def experts_over(cfg: Config, mesh: Mesh | AbstractMesh, local: Experts = routed_experts) -> Experts:
    """The routed experts of the forward pass inside `shard_map`; `local` computes one device's share.

    Formats of the exchange: what the mesh config names, or else what the precision policy says.
    """
    policy = preset(cfg.precision)
    by_policy = Wire() if policy is None else Wire(policy.dispatch, policy.combine)
    return spread_experts(cfg.model, cfg.mesh, mesh, by_policy, local)


def moe_stack_over(cfg: Config, mesh: Mesh | AbstractMesh, experts: Experts) -> Stack:
    """How the forward pass runs its MoE layers: the batch whole, or in two halves (`mesh.overlap`).

    Raises ValueError if there is no exchange to overlap with.
    """
    if not cfg.mesh.overlap:
        return stack
    if not isinstance(experts, MeshExperts):
        raise ValueError(
            f"mesh.overlap=True, but no tokens travel: mesh.experts={cfg.mesh.experts!r} on mesh "
            f"node={mesh.shape['node']} local={mesh.shape['local']} tensor={mesh.shape['tensor']} with "
            f"n_routed_experts={cfg.model.n_routed_experts}; spread the experts over node x local x tensor, or set "
            "config.mesh.overlap=False"
        )
    return overlapped(experts)

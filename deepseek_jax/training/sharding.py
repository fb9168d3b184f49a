"""How a training run lies on its mesh: what of the state each device holds, and how it reaches the experts.

Parameters and their moments are whole on every device, except the experts' where `mesh.experts` spreads them over
node x local (report section 3.2.2).
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import Config
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.moe import Experts
from deepseek_jax.model.transformer import Stack, model_params, stack
from deepseek_jax.parallel.experts import MeshExperts, mesh_experts, nodes_per_token
from deepseek_jax.parallel.mesh import BATCH_AXES, expert_exchange, param_specs, replicated, rules, spec_axes
from deepseek_jax.parallel.overlap import overlapped
from deepseek_jax.parallel.wire import Wire
from deepseek_jax.precision import preset
from deepseek_jax.training.optimizer import AdamWState
from deepseek_jax.training.state import TrainState


def parameter_specs(cfg: Config, mesh: Mesh) -> Any:
    """`PartitionSpec` of every parameter. Raises ValueError, with names and numbers, for what does not divide."""
    return param_specs(model_params(cfg.model), mesh, rules(cfg.mesh, mesh))


def state_shardings(cfg: Config, mesh: Mesh) -> Any:
    """A `TrainState` of shardings: the moments lie where their parameters are, the rest is everywhere."""
    specs = parameter_specs(cfg, mesh)
    params = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    whole: Any = replicated(mesh)
    return TrainState(whole, params, AdamWState(whole, params, params), whole, whole, whole, whole)


def _wire(cfg: Config) -> Wire:
    """Formats of the exchange: what the config names, or else what its precision policy says."""
    policy = preset(cfg.precision)
    by_policy = Wire() if policy is None else Wire(policy.dispatch, policy.combine)
    named = {name: getattr(cfg.mesh, name) for name in ("dispatch", "combine")}
    return dataclasses.replace(by_policy, **{name: form for name, form in named.items() if form != "auto"})


def experts_over(cfg: Config, mesh: Mesh, local: Experts = routed_experts) -> Experts:
    """The routed experts of the forward pass inside `shard_map`; `local` computes one device's share."""
    mode = expert_exchange(cfg.mesh, mesh)
    if mode == "replicated" or not cfg.model.n_routed_experts:
        return local
    return mesh_experts(
        mode,
        local=local,
        wire=_wire(cfg),
        most=nodes_per_token(cfg.model, mesh.shape["node"]) if mode == "two_hop" else None,
        capacity=cfg.mesh.receive or None,
    )


def moe_stack_over(cfg: Config, mesh: Mesh, experts: Experts) -> Stack:
    """How the forward pass runs its MoE layers: the batch whole, or in two halves (`mesh.overlap`).

    Raises ValueError if there is no exchange to overlap with.
    """
    if not cfg.mesh.overlap:
        return stack
    if not isinstance(experts, MeshExperts):
        raise ValueError(
            f"mesh.overlap=True, but no tokens travel: mesh.experts={cfg.mesh.experts!r} on mesh "
            f"node={mesh.shape['node']} local={mesh.shape['local']} with n_routed_experts="
            f"{cfg.model.n_routed_experts}; spread the experts over node x local, or set config.mesh.overlap=False"
        )
    return overlapped(experts)


def sum_gradients(grads: Any, specs: Any) -> Any:
    """Sum over the batch axes, of each gradient over those that do not shard it: inside `shard_map`.

    A sharded parameter's gradient holds the tokens of all the devices that share its experts: they were dispatched.
    """

    def one(g, spec):
        axes = tuple(a for a in BATCH_AXES if a not in spec_axes(spec))
        return jax.lax.psum(g, axes)

    return jax.tree.map(one, grads, specs)

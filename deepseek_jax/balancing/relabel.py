"""Slots of a new plan renamed after the old one, so that few experts move.

Plans made one after the other have little in common, since GPUs that are alike may trade what they hold. Which of them is
called how changes no load; so each layer's names are chosen as an assignment problem: nodes among each other, where fewer experts
then cross between nodes; GPUs inside a node; slots inside a GPU. Where groups of experts need not stay together on nodes, GPUs
are named over all nodes at once.

Dims: l layer, g new GPU, h old GPU, n node, m slot of a GPU, e expert, p slot.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from deepseek_jax.balancing.plan import Floats, Ints, Plan
from deepseek_jax.checks import require

Indices = npt.NDArray[np.intp]


class Costs(NamedTuple):
    """Slots that must be filled if a new GPU takes the name of an old one, by where the expert comes from [l, g, h]."""

    same_gpu: Floats
    same_node: Floats
    across: Floats

    def ordered(self) -> Floats:
        """One number: fewest across nodes, of these fewest between GPUs, of these fewest inside."""
        much = 1 + self.same_gpu.shape[1] * sum(part.max() for part in self)  # than all slots
        return (self.across * much + self.same_node) * much + self.same_gpu


def relabelled(new: Plan, old: Plan, gpus: int, nodes: int, *, together: bool = True) -> Plan:
    """`new` with its nodes, GPUs and slots renamed. What lies on a GPU with what, and so the loads of GPUs, is unchanged.

    together: what lies on one node stays so, as the hierarchical policy wants it.

    Raises ValueError: plans of different shapes, slots that do not divide over GPUs, GPUs that do not over nodes.
    """
    _check(new, old, gpus, nodes)
    new_lgm, old_lgm = (plan.physical_lp.reshape(len(plan.physical_lp), gpus, -1) for plan in (new, old))
    costs = _costs(new_lgm, old_lgm, nodes, max(new.experts, old.experts))
    if together:
        taken_lh = _by_nodes(costs, nodes)
    else:
        taken_lh = np.stack([_assigned(cost_gh) for cost_gh in costs.ordered()])
    return Plan(
        _slots(np.take_along_axis(new_lgm, taken_lh[..., None], 1), old_lgm).reshape(old.physical_lp.shape)
    )


def _check(new: Plan, old: Plan, gpus: int, nodes: int) -> None:
    shapes = new.physical_lp.shape, old.physical_lp.shape
    require(
        shapes[0] == shapes[1],
        f"plans of {shapes[0]} and {shapes[1]} [layers, slots] have no slots in common",
    )
    require(shapes[0][1] % gpus == 0, f"{shapes[0][1]} slots do not divide over {gpus} GPUs")
    require(gpus % nodes == 0, f"{gpus} GPUs do not divide over {nodes} nodes")


def _costs(new_lgm: Ints, old_lgm: Ints, nodes: int, experts: int) -> Costs:
    layers, gpus, slots = old_lgm.shape
    new_lge, old_lge = _counts(new_lgm, experts), _counts(old_lgm, experts)
    at_node_lne = old_lge.reshape(layers, nodes, -1, experts).max(2) > 0
    stay = sum(
        (new_lge >= n).astype(np.float64) @ (old_lge >= n).astype(np.float64).mT
        for n in range(1, int(min(new_lge.max(), old_lge.max())) + 1)
    )
    on_gpu = new_lge @ (old_lge > 0).astype(np.float64).mT
    on_node = np.repeat(new_lge @ at_node_lne.astype(np.float64).mT, gpus // nodes, 2)
    return Costs(on_gpu - stay, on_node - on_gpu, slots - on_node)


def _counts(expert_lgm: Ints, experts: int) -> Floats:
    """Slots of each expert on each GPU [l, g, e]."""
    layers, gpus, _ = expert_lgm.shape
    at = np.arange(layers * gpus).reshape(layers, gpus, 1) * experts + expert_lgm
    counts = np.bincount(at.ravel(), minlength=layers * gpus * experts)
    return counts.reshape(layers, gpus, experts).astype(np.float64)


def _assigned(cost_gh: Floats) -> Indices:
    """Which new one each old one takes, at the lowest sum; each keeps its own where that costs no more."""
    new_g, old_h = linear_sum_assignment(cost_gh)
    if cost_gh[new_g, old_h].sum() >= np.trace(cost_gh):
        return np.arange(len(cost_gh))
    taken_h = np.empty_like(old_h)
    taken_h[old_h] = new_g
    return taken_h


def _by_nodes(costs: Costs, nodes: int) -> Indices:
    """Nodes first, then GPUs inside each: which new GPU each old one takes [l, h]."""
    cost_lgh, (layers, gpus, _) = costs.ordered(), costs.across.shape
    each = gpus // nodes
    across_lnn = costs.across.reshape(layers, nodes, each, nodes, each)[..., 0].sum(2)
    taken_lh = np.empty((layers, gpus), np.intp)
    for layer, across_nn in enumerate(across_lnn):
        for node, new in enumerate(_assigned(across_nn)):
            here, there = (slice(n * each, (n + 1) * each) for n in (node, new))
            taken_lh[layer, here] = new * each + _assigned(cost_lgh[layer, there, here])
    return taken_lh


def _slots(new_lgm: Ints, old_lgm: Ints) -> Ints:
    """Each GPU's experts in the slots in which they are already; the others in those left."""
    same = _nth(new_lgm)[..., None, :] == _nth(old_lgm)[..., None]  # old slot, new slot
    stays, found = same.any(-1), same.any(-2)
    left, come = (np.argsort(kept, axis=-1, kind="stable") for kept in (stays, found))
    filled = np.empty_like(new_lgm)
    np.put_along_axis(filled, left, np.take_along_axis(new_lgm, come, -1), -1)
    return np.where(stays, old_lgm, filled)


def _nth(expert_lgm: Ints) -> Ints:
    """A number for each slot that tells a GPU's slots of one expert apart, the first, the second and so on."""
    slots = expert_lgm.shape[-1]
    same = expert_lgm[..., None, :] == expert_lgm[..., None]
    return expert_lgm * slots + np.tril(same, -1).sum(-1).astype(np.int32)

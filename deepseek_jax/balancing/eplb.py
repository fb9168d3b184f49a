"""EPLB, DeepSeek's planner of redundant experts: which get copies, and which slot each copy lies in (report section 3.4.1).

Hierarchical, where the groups of experts divide over the nodes: groups are packed into nodes, each node's heaviest experts get
copies, these are packed into its GPUs. Global, otherwise: the same for a single group on a single node. Loads are float32 and
of equals the first comes first, so that a plan is a function of the loads, bit by bit.

How even it is. Packing leaves any two packs apart by at most the heaviest item. For let A get its last item x. A pack B that is
not full then has at least A's load before x. One that is full has only items of c, its smallest, or more, and what A gets after
that is at most c; so take c from every item, of which A and B have as many. Look at the last item of A, its k-th, that came when
B had fewer than k: what A had before it is at most what B had, and against each later one, the q-th, stands B's q-th, which came
before it and is no less. So a GPU has at most the mean of its node and the heaviest copy. The heaviest copy in turn is at most
1 / extra of the load of all experts with `extra` more slots than experts: each expert with n > 1 copies has n - 1 times as much,
or it would not have got the last one.

Dims: x rows packed side by side (layers, or nodes of layers), i item, l layer, e expert, p slot.
"""

import numpy as np
import numpy.typing as npt

from deepseek_jax.balancing.plan import Ints, Plan, Unit
from deepseek_jax.checks import is_integer, require, shown

Loads = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]


def rebalance_experts(
    weight_le: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Ints, Ints, Ints]:
    """Loads of the experts -> (phy2log [l, p], log2phy [l, e, most copies], logcnt [l, e]), int32.

    phy2log: the expert of each slot, GPU by GPU. log2phy: the slots of each expert in the order in which it got them, then -1.
    logcnt: how many.

    Raises ValueError: loads that are no table of finite numbers >= 0; fewer slots than experts; numbers that do not divide.
    """
    load_le = _loads(weight_le)
    unit = _checked(Unit(num_replicas, num_groups, num_nodes, num_gpus), load_le.shape[1])
    if not unit.hierarchical:
        unit = unit._replace(groups=1, nodes=1)
    phy2log, copy_lp, logcnt = _hierarchical(load_le, unit)
    log2phy = np.full((*load_le.shape, logcnt.max()), -1, np.int32)
    log2phy[np.arange(len(load_le))[:, None], phy2log, copy_lp] = np.arange(num_replicas)
    return phy2log.astype(np.int32), log2phy, logcnt.astype(np.int32)


def planned(weight_le: npt.ArrayLike, unit: Unit) -> Plan:
    """The plan for loads, as `rebalance_experts`; of a layer without any, as if its experts had equal ones."""
    load_le = _loads(weight_le)
    return Plan(rebalance_experts(np.where(load_le.any(1, keepdims=True), load_le, 1), *unit)[0])


def even(layers: int, experts: int, unit: Unit) -> Plan:
    """The plan to begin with, when no load is known. A group lies on one node where groups divide over nodes."""
    return planned(np.ones((layers, experts)), unit)


def _loads(weight_le: npt.ArrayLike) -> Loads:
    with np.errstate(over="ignore"):
        load_le = np.asarray(weight_le, np.float32)
        whole_l = load_le.sum(-1)
    table = load_le.ndim == 2 and load_le.size > 0
    require(table, f"loads of shape {load_le.shape} should be [layers, experts]")
    wrong = load_le[~(np.isfinite(load_le) & (load_le >= 0))]
    require(not wrong.size, f"a load is {wrong[:1].sum()}; loads are finite numbers >= 0")
    much = np.flatnonzero(~np.isfinite(whole_l))
    require(not much.size, f"loads of layer {much[:1].sum()} sum to more than float32 holds; divide them")
    return load_le


def _checked(unit: Unit, experts: int) -> Unit:
    for name, n in unit._asdict().items():
        require(is_integer(n) and n >= 1, f"{name}={shown(n)} must be a positive integer")
    slots, groups, nodes, gpus = unit
    if slots < experts:
        raise ValueError(
            f"{slots} slots have no room for {experts} experts; give at least as many slots as experts"
        )
    if slots % gpus:
        raise ValueError(
            f"{slots} slots do not divide over {gpus} GPUs; {slots - slots % gpus} or {slots + -slots % gpus} do"
        )
    if unit.hierarchical and gpus % nodes:
        raise ValueError(f"{gpus} GPUs do not divide over {nodes} nodes; give each node as many")
    if unit.hierarchical and experts % groups:
        raise ValueError(f"{experts} experts do not divide into {groups} groups; give each group as many")
    return unit


def _hierarchical(load_le: Loads, unit: Unit) -> tuple[Indices, Indices, Indices]:
    """-> (expert of each slot [l, p], which of its copies this is [l, p], copies of each expert [l, e])"""
    (layers, experts), (slots, groups, nodes, gpus) = load_le.shape, unit
    group = experts // groups
    # In the order of nodes: where each expert comes, and which comes where.
    group_lg = _packed(load_le.reshape(layers, groups, group).sum(2), nodes)
    order_le = (group_lg[:, :, None] * group + np.arange(group)).reshape(layers, experts)
    load_xe = np.take_along_axis(load_le, order_le, 1).reshape(layers * nodes, experts // nodes)
    expert_xp, copy_xp, count_xe = _copied(load_xe, slots // nodes)
    share_xe: Loads = np.divide(load_xe, count_xe, dtype=np.float32)
    place_xp = _packed(np.take_along_axis(share_xe, expert_xp, 1), gpus // nodes)
    expert_xp = np.take_along_axis(expert_xp, place_xp, 1)
    expert_lp = expert_xp.reshape(layers, nodes, -1) + np.arange(0, experts, experts // nodes)[:, None]
    expert_lp = np.take_along_axis(order_le, expert_lp.reshape(layers, slots), 1)
    copy_lp = np.take_along_axis(copy_xp, place_xp, 1).reshape(layers, slots)
    count_le = np.empty((layers, experts), np.intp)
    np.put_along_axis(count_le, order_le, count_xe.reshape(layers, experts), 1)
    return expert_lp, copy_lp, count_le


def _packed(load_xi: Loads, packs: int) -> Indices:
    """Items -> their order by packs of equally many: heaviest first, each into the lightest pack that is not full. As many packs
    as items take them as they come."""
    rows, items = load_xi.shape
    room = items // packs
    if room == 1:
        return np.tile(np.arange(items), (rows, 1))
    row = np.arange(rows)
    held = np.zeros((rows, packs), np.intp)
    weight = np.zeros((rows, packs), np.float32)  # infinite once full
    order = np.empty((rows, items), np.intp)
    for item in np.argsort(-load_xi, axis=1, kind="stable").T:
        pack = weight.argmin(1)
        order[row, pack * room + held[row, pack]] = item
        weight[row, pack] += load_xi[row, item]
        held[row, pack] += 1
        weight[row, pack] = np.where(held[row, pack] == room, np.inf, weight[row, pack])
    return order


def _copied(load_xe: Loads, slots: int) -> tuple[Indices, Indices, Indices]:
    """-> (expert of each slot, which of its copies this is, copies of each expert): one each, then one more for whichever expert
    has the heaviest copies, slot by slot."""
    rows, experts = load_xe.shape
    row = np.arange(rows)
    expert = np.tile(np.arange(slots), (rows, 1))
    copy = np.zeros((rows, slots), np.intp)
    count = np.ones((rows, experts), np.intp)
    share = load_xe.copy()
    for slot in range(experts, slots):
        heaviest = share.argmax(1)
        expert[:, slot], copy[:, slot] = heaviest, count[row, heaviest]
        count[row, heaviest] += 1
        share[row, heaviest] = np.divide(load_xe[row, heaviest], count[row, heaviest], dtype=np.float32)
    return expert, copy, count

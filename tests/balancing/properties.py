"""Properties of plans over random cases, and an oracle: EPLB of one layer in loops.

python -m tests.balancing.properties [cases] [seed]
"""

import sys
from fractions import Fraction

import numpy as np

from deepseek_jax.balancing.eplb import rebalance_experts
from deepseek_jax.balancing.moves import count, sources
from deepseek_jax.balancing.plan import Plan, Unit, loads_of_gpus
from deepseek_jax.balancing.relabel import relabelled

EPS = Fraction(1, 1 << 23)


# --- oracle -----------------------------------------------------------------------------------------------------------


def pack(loads, packs):
    """The items of each pack, in the order in which they came."""
    if len(loads) == packs:
        return [[item] for item in range(packs)]
    held, weight = [[] for _ in range(packs)], [np.float32(0)] * packs
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        open_ = [p for p in range(packs) if len(held[p]) < len(loads) // packs]
        to = min(open_, key=lambda p: weight[p])
        held[to].append(item)
        weight[to] = np.float32(weight[to] + loads[item])
    return held


def expert_of_each_slot(loads, unit):
    """Of one layer: [(expert, which of its copies)], slot by slot."""
    slots, groups, nodes, gpus = unit if unit.groups % unit.nodes == 0 else (unit.slots, 1, 1, unit.gpus)
    size, found = len(loads) // groups, []
    of_groups = [np.float32(sum(loads[g * size : (g + 1) * size])) for g in range(groups)]
    for held in pack(of_groups, nodes):
        experts = [expert for group in held for expert in range(group * size, (group + 1) * size)]
        copies = dict.fromkeys(experts, 1)
        here = [(expert, 0) for expert in experts]
        while len(here) < slots // nodes:
            heaviest = max(experts, key=lambda e: np.float32(loads[e] / np.float32(copies[e])))
            here.append((heaviest, copies[heaviest]))
            copies[heaviest] += 1
        shares = [np.float32(loads[e] / np.float32(copies[e])) for e, _ in here]
        found += [here[slot] for gpu in pack(shares, gpus // nodes) for slot in gpu]
    return found


# --- cases ------------------------------------------------------------------------------------------------------------


def case(rng):
    """Loads of 1 to 3 layers, and a unit: integers below 2^20, whose sums float32 holds exactly; many equal, at times none."""
    nodes, each, groups_of_node, size = (int(rng.integers(1, most)) for most in (5, 5, 4, 9))
    groups, gpus = nodes * groups_of_node, nodes * each
    if rng.random() < 0.4:  # global, unless the groups divide
        size, groups = groups * size, 1
    experts = groups * size
    slots = gpus * (-(-experts // gpus) + int(rng.integers(0, 4)))
    shape = int(rng.integers(1, 4)), experts
    loads = rng.choice(
        [
            rng.integers(0, 1 << int(rng.integers(1, 16)), shape),
            rng.permuted(np.tile((1 << 15) // np.arange(1, experts + 1), (shape[0], 1)), axis=1),
            rng.integers(0, 3, shape) * 1000,
        ]
    )
    return loads, Unit(slots, groups, nodes, gpus)


def holds(rng):
    """One case: raises AssertionError for a property that does not hold."""
    loads, unit = case(rng)
    phy2log, log2phy, logcnt = rebalance_experts(loads, *unit)
    equals_the_oracle(loads, unit, phy2log, log2phy, logcnt)
    spread_is_bounded(loads, unit, phy2log, logcnt)
    of_others = rng.permuted(loads, axis=1) if rng.random() < 0.5 else rng.poisson(loads)
    names_change_no_load(Plan(phy2log), Plan(rebalance_experts(of_others, *unit)[0]), unit, of_others)


def equals_the_oracle(loads, unit, phy2log, log2phy, logcnt):
    """Every slot has an expert, every expert a slot, the numbers of copies are right, all slots are listed once."""
    for layer, of_layer in enumerate(loads.astype(np.float32)):
        want = expert_of_each_slot(of_layer, unit)
        assert phy2log[layer].tolist() == [expert for expert, _ in want]
        assert [log2phy[layer][at] for at in want] == list(range(unit.slots))
        assert np.bincount(phy2log[layer], minlength=loads.shape[1]).tolist() == logcnt[layer].tolist()
        assert logcnt[layer].min() >= 1 and (log2phy[layer] >= 0).sum() == unit.slots


def spread_is_bounded(loads, unit, phy2log, logcnt):
    """Nodes differ by the heaviest group at most, the GPUs of a node by the heaviest copy on it, which is at most 1 / extra of the
    load of the node; in exact fractions, but for the rounding of float32 sums of a GPU's copies, by which EPLB chooses."""
    nodes = unit.nodes if unit.hierarchical else 1
    for of_layer, expert_p, copies in zip(loads.tolist(), phy2log.tolist(), logcnt.tolist(), strict=True):
        shares = [Fraction(of_layer[e], copies[e]) for e in expert_p]
        at_node = unit.slots // nodes
        of_groups = np.array(of_layer).reshape(unit.groups if nodes > 1 else 1, -1).sum(1)
        of_nodes = [sum(shares[n * at_node : (n + 1) * at_node]) for n in range(nodes)]
        assert max(of_nodes) - min(of_nodes) <= max(of_groups.tolist())
        for node in range(nodes):
            here = slice(node * at_node, (node + 1) * at_node)
            each = at_node * nodes // unit.gpus
            gpus = [sum(shares[here][g : g + each]) for g in range(0, at_node, each)]
            rounding = 4 * each * EPS * max(gpus)
            assert max(gpus) - min(gpus) <= max(shares[here]) + rounding
            of_node = {e: of_layer[e] for e in expert_p[here]}
            extra = at_node - len(of_node)
            heaviest = max(of_layer[e] / Fraction(copies[e]) for e in of_node)
            assert heaviest <= sum(of_node.values()) / Fraction(max(extra, 1)) * (1 + 2 * EPS)


def names_change_no_load(old, new, unit, loads):
    nodes = unit.nodes
    named = relabelled(new, old, unit.gpus, nodes, together=unit.hierarchical)
    found, want = (loads_of_gpus(plan, loads, unit.gpus) for plan in (named, new))
    held, before = (
        np.sort(plan.physical_lp.reshape(-1, unit.gpus, unit.slots // unit.gpus)) for plan in (named, new)
    )
    for layer in range(len(loads)):
        np.testing.assert_allclose(np.sort(found[layer]), np.sort(want[layer]), rtol=1e-12)
        assert sorted(map(tuple, held[layer].tolist())) == sorted(map(tuple, before[layer].tolist()))
    if unit.hierarchical:
        nodes_hold_the_same(named, new, nodes)
    sources_of = {
        plan: sources(plans, old, unit.gpus, nodes) for plan, plans in (("named", named), ("new", new))
    }
    of_named, of_new = (count(sources_of[plan], unit.gpus, nodes) for plan in ("named", "new"))
    fewer = (of_named.across, of_named.same_node, of_named.same_gpu) <= (
        of_new.across,
        of_new.same_node,
        of_new.same_gpu,
    )
    assert fewer, (of_named, of_new)
    for plan, made in (("named", named), ("new", new)):
        of_sources = np.take_along_axis(old.physical_lp, sources_of[plan], 1)
        np.testing.assert_array_equal(of_sources, made.physical_lp)


def nodes_hold_the_same(named, new, nodes):
    for a, b in zip(named.physical_lp, new.physical_lp, strict=True):
        assert sorted(map(tuple, np.sort(a.reshape(nodes, -1)).tolist())) == sorted(
            map(tuple, np.sort(b.reshape(nodes, -1)).tolist())
        )


def main(cases=10_000, seed=0):
    rng = np.random.default_rng(seed)
    for n in range(int(cases)):
        state = rng.bit_generator.state
        try:
            holds(rng)
        except Exception:
            print(f"case {n} of seed {seed}: {case(np.random.Generator(from_state(state)))}")
            raise
    print(f"{cases} random cases hold")


def from_state(state):
    generator = np.random.PCG64()
    generator.state = state
    return generator


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

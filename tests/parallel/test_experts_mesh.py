"""Experts over a mesh of eight devices: every mode gives what one device gives, whatever the routing.

Dims: n token (of all devices), d hidden, f expert inner, e expert, k selected expert.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.transformer import recompute
from deepseek_jax.parallel.experts import mesh_experts, nodes_per_token
from deepseek_jax.parallel.low_latency import grouped_experts, low_latency_experts, masked_experts
from deepseek_jax.parallel.wire import Wire
from tests.parallel.comparison import BOUND, difference
from tests.parallel.harness import dense, on_mesh

E, K, D, F = 16, 3, 10, 6
MESHES = {
    (8, 1): 6,
    (4, 2): 5,
    (2, 4): 4,
    (1, 8): 3,
}  # (node, local) -> tokens per device: fewer than peers too
MODES = {
    "flat": mesh_experts("flat", local=dense),
    "two_hop": mesh_experts("two_hop", local=dense),
    "flat in rounds": mesh_experts("flat", local=dense, capacity=0.7),
    "two_hop in rounds": mesh_experts("two_hop", local=dense, capacity=1.5),
    "low latency": low_latency_experts(),
}


def routings(n):
    """Expert ids int32 [n, K] by name; -1 selects none."""
    rng = np.random.default_rng(1)
    absent = np.full((n, K), -1)
    one = absent.copy()
    one[:, 1] = 5
    few = rng.permuted(np.tile(np.arange(0, E, 4), (n, 1)), axis=1)[:, :K]
    some = rng.permuted(np.tile(np.arange(E), (n, 1)), axis=1)[:, :K]
    return {
        "balanced": (np.arange(n)[:, None] * K + np.arange(K)) % E,
        "random": some,
        "all to one expert": one,
        "all to one device": np.tile(np.array([E - 1, E - 2, -1]), (n, 1)),
        "experts without tokens": few,
        "tokens without experts": np.where(rng.random((n, K)) < 0.6, -1, some),
        "nobody": absent,
    }


def arrays(n):
    """(params, x, weights, cotangent of the result)"""
    rng = np.random.default_rng(0)
    shapes = {"w_gate_edf": (E, D, F), "w_up_edf": (E, D, F), "w_down_efd": (E, F, D)}
    p = {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    x, g = rng.normal(size=(2, n, D)).astype(np.float32)
    return p, x, rng.uniform(0.1, 1, (n, K)).astype(np.float32), g


def with_gradients(experts):
    """(params, x, weights, g, ids) -> (y, gradients of <y, g> for params, x, weights)"""

    def run(p, x, w, g, ids):
        def product(p, x, w):
            y = experts(p, x, ids, w)
            return (y * g).sum(), y

        (_, y), grads = jax.value_and_grad(product, argnums=(0, 1, 2), has_aux=True)(p, x, w)
        return {"y": y, "params": grads[0], "x": grads[1], "weights": grads[2]}

    return run


def modes_of(shape):
    """What of MODES differs on this mesh from another: over one hop, (4, 2) stands for all meshes of 8."""
    if 1 in shape:
        return ["two_hop"]
    return list(MODES) if shape == (4, 2) else [name for name in MODES if "two_hop" in name]


@functools.cache
def all_modes(shape):
    """One program per mesh: its modes with their gradients."""
    runs = {name: with_gradients(MODES[name]) for name in modes_of(shape)}
    return on_mesh(lambda *args: {name: run(*args) for name, run in runs.items()}, shape, 5)


@functools.cache
def single_device():
    return jax.jit(with_gradients(dense))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mode_and_gradient_equal_one_device(shape):
    n = 8 * MESHES[shape]
    p, x, w, g = arrays(n)
    for routing, ids in routings(n).items():
        ids = ids.astype(np.int32)
        want = single_device()(p, x, w, g, ids)
        for mode, got in all_modes(shape)(p, x, w, g, ids).items():
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
            ):
                where = f"{mode}, {routing}, {jax.tree_util.keystr(path)}"
                assert difference(a, b) < BOUND, where


def test_rounds_send_what_one_exchange_sends_in_fp8():
    wire, n = Wire("fp8", "bf16"), 24
    p, x, w, g = arrays(n)

    def both(*args):
        runs = (mesh_experts("two_hop", local=dense, wire=wire, capacity=c) for c in (None, 1.0))
        return [with_gradients(experts)(*args) for experts in runs]

    once, rounds = on_mesh(both, (2, 4), 5)(p, x, w, g, routings(n)["random"].astype(np.int32))
    for a, b in zip(jax.tree.leaves(rounds), jax.tree.leaves(once), strict=True):
        assert difference(a, b) < BOUND
    exact = single_device()(p, x, w, g, routings(n)["random"].astype(np.int32))
    assert 1e-3 < difference(once["y"], exact["y"]) < 0.1  # E4M3: 3 bits of fraction


def test_the_oracle_is_the_models_function():
    p, x, w, g = arrays(24)
    ids = routings(24)["tokens without experts"].astype(np.int32)
    want = jax.jit(with_gradients(routed_experts))(p, x, w, g, ids)
    got = single_device()(p, x, w, g, ids)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert difference(a, b) < BOUND


# --- one plan ---------------------------------------------------------------------------------------------------


def collectives(remat, capacity):
    """How often each collective stands in the traced gradient of one layer."""
    experts = mesh_experts("two_hop", local=dense, capacity=capacity)

    def layer(p, x, ids, w):
        return recompute(lambda p, x, w: experts(p, x, ids, w), remat)(p, x, w)

    p, x, w, g = arrays(40)
    ids = routings(40)["random"].astype(np.int32)
    text = str(on_mesh(with_gradients(layer), (4, 2), 5).trace(p, x, w, g, ids).jaxpr)
    return {name: len(re.findall(rf"\b{name}\[", text)) for name in ("all_gather", "ragged_all_to_all")}


@pytest.mark.parametrize(("capacity", "once", "recomputed"), [(None, 10, 12), (2.0, 12, 12)])
def test_the_layout_is_computed_once_whatever_is_recomputed(capacity, once, recomputed):
    """Two hops each: ids, dispatch, combine and the two of the backward pass. Recomputing everything dispatches the
    tokens again, which rounds do anyway; it exchanges neither counts nor ids again."""
    for remat, want in (("none", once), ("deepseek", once), ("full", recomputed)):
        assert collectives(remat, capacity) == {"all_gather": 2, "ragged_all_to_all": want}, remat


# --- node limit -------------------------------------------------------------------------------------------------


def model(groups, kept, k=6, experts=48):
    return ModelConfig(n_routed_experts=experts, n_group=groups, topk_group=kept, num_experts_per_tok=k)


def most_nodes(cfg, nodes):
    """By trying every choice of groups."""
    group, node = cfg.n_routed_experts // cfg.n_group, cfg.n_routed_experts // nodes
    choices = itertools.combinations(range(cfg.n_group), cfg.topk_group)
    reached = [{e // node for g in kept for e in range(g * group, (g + 1) * group)} for kept in choices]
    return min(cfg.num_experts_per_tok, max(map(len, reached)))


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("groups", [1, 4, 6, 8])
def test_nodes_per_token_bounds_every_choice_of_groups(groups, nodes):
    for kept in range(1, min(groups, 4) + 1):
        cfg = model(groups, kept)
        bound, reached = nodes_per_token(cfg, nodes), most_nodes(cfg, nodes)
        assert bound >= reached
        if groups % nodes == 0 or nodes % groups == 0:  # a group within a node, or nodes within a group
            assert bound == reached, kept


def test_deepseek_v3_reaches_four_nodes():
    v3 = model(8, 4, k=8, experts=256)
    assert [nodes_per_token(v3, nodes) for nodes in (1, 2, 4, 8, 16)] == [1, 2, 4, 4, 8]
    with pytest.raises(ValueError, match="n_routed_experts=256 do not divide over 3 nodes"):
        nodes_per_token(v3, 3)


def test_a_token_of_more_nodes_than_told_is_not_silently_wrong():
    """A limit that is too low must not cost a token part of its experts: it becomes NaN, the others are right."""
    experts, n = mesh_experts("two_hop", local=dense, most=2), 40
    p, x, w, _ = arrays(n)
    ids = routings(n)["random"].astype(np.int32)
    got = np.asarray(on_mesh(experts, (4, 2), 4)(p, x, ids, w))
    nodes = np.array([len({e // (E // 4) for e in row}) for row in ids])
    assert (np.isnan(got).all(1) == (nodes > 2)).all() and (nodes > 2).any()
    want = np.asarray(jax.jit(dense)(p, x, ids, w))
    assert difference(got[nodes <= 2], want[nodes <= 2]) < BOUND


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "three_hop"}, r"mode='three_hop' is not one of \['flat', 'two_hop'\]"),
        ({"capacity": 0}, "capacity=0 must be positive, or None"),
    ],
)
def test_what_mesh_experts_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        mesh_experts(**kwargs)


def test_grouped_experts_of_a_masked_buffer_are_the_batched_ones():
    """On the rows that are there, and zero elsewhere. Sums of D or F products in another order."""
    e, m = 4, 5
    p = {name: jnp.asarray(w[:e]) for name, w in arrays(1)[0].items()}
    x_emd = np.random.default_rng(2).normal(0, 1, (e, m, D)).astype(np.float32)
    rows_e = jnp.array([5, 0, 3, 1], jnp.int32)
    got = np.asarray(grouped_experts(p, x_emd, rows_e))
    there = np.arange(m) < np.asarray(rows_e)[:, None]
    assert difference(got[there], np.asarray(masked_experts(p, x_emd, rows_e))[there]) < BOUND
    assert not got[~there].any()

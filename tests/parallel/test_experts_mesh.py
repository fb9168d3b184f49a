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
from deepseek_jax.model.recompute import recompute
from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.low_latency import LowLatency, grouped_experts, masked_experts
from deepseek_jax.parallel.exchange.placement import nodes_per_token
from deepseek_jax.parallel.exchange.wire import Wire
from tests.parallel.comparison import BOUND, difference
from tests.parallel.harness import D, E, arrays, dense, on_mesh, routings, single_device, with_gradients

MESHES = {
    (8, 1): 6,
    (4, 2): 5,
    (2, 4): 4,
    (1, 8): 3,
}  # (node, local) -> tokens per device: fewer than peers too
MODES = {
    "flat": Ragged(mode="flat", function=dense),
    "two_hop": Ragged(function=dense),
    "flat in rounds": Ragged(mode="flat", function=dense, receive=0.7),
    "two_hop in rounds": Ragged(function=dense, receive=1.5),
    "low latency": LowLatency(),
}


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


@pytest.mark.parametrize(("mode", "combine"), [("flat", "bf16"), ("two_hop", "same")])
def test_rounds_send_what_one_exchange_sends_in_fp8(mode, combine):
    """With two hops, the sums of the first round and of the others cross nodes apart: in BF16 each would be rounded."""
    wire, n = Wire("fp8", combine), 24
    p, x, w, g = arrays(n)

    def both(*args):
        runs = (Ragged(mode=mode, function=dense, wire=wire, receive=c) for c in (None, 1.0))
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


def collectives(remat, receive):
    """How often each collective stands in the traced gradient of one layer."""
    experts = Ragged(function=dense, receive=receive)

    def layer(p, x, ids, w):
        return recompute(lambda p, x, w: experts(p, x, ids, w), remat)(p, x, w)

    p, x, w, g = arrays(40)
    ids = routings(40)["random"].astype(np.int32)
    text = str(on_mesh(with_gradients(layer), (4, 2), 5).trace(p, x, w, g, ids).jaxpr)
    return {name: len(re.findall(rf"\b{name}\[", text)) for name in ("all_gather", "ragged_all_to_all")}


@pytest.mark.parametrize(("receive", "once"), [(None, 9), (2.0, 19)])
def test_the_layout_is_computed_once_whatever_is_recomputed(receive, once):
    """Two hops each: dispatch, combine and the two of the backward pass; the plan exchanges ids between nodes, and counts
    by an all-gather per hop. Recomputing everything dispatches the tokens again; it exchanges neither counts nor ids
    again. Further rounds, where there can be any, dispatch again, forwards and backwards; their counts came with the plan:
    an all-gather that waits in a branch may meet another one on CPUs, with wrong numbers or an abort."""
    for remat, want in (("none", once), ("deepseek", once), ("full", once + 2)):
        assert collectives(remat, receive) == {"all_gather": 2, "ragged_all_to_all": want}, remat


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
    experts, n = Ragged(function=dense, most=2), 40
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
        ({"receive": 0}, "receive=0 must be positive, or None"),
    ],
)
def test_what_ragged_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Ragged(**kwargs)


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

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
from deepseek_jax.parallel.exchange import peers
from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.low_latency import LowLatency
from deepseek_jax.parallel.exchange.placement import nodes_per_token
from deepseek_jax.parallel.exchange.wire import Wire
from deepseek_jax.precision import operands, preset
from deepseek_jax.precision.product import Quantised, quantise_weight
from pallas_kernels.fp8_grouped_gemm.ops import fp8_grouped_gemm_masked
from pallas_kernels.peer_exchange.ops import peer_exchange
from tests.parallel.comparison import BOUND, difference
from tests.parallel.harness import E, arrays, dense, on_mesh, routings, single_device, with_gradients

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


# --- low latency ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_low_latency_equals_one_device(shape):
    """Whatever the routing: with as many experts on a device as a token chooses, or fewer, in buffers of one size."""
    n = 8 * MESHES[shape]
    p, x, w, _ = arrays(n)
    run = on_mesh(LowLatency(), shape, 4)
    for routing, ids in routings(n).items():
        want = np.asarray(jax.jit(dense)(p, x, ids, w))
        assert difference(run(p, x, ids.astype(np.int32), w), want) < BOUND, routing


WIDE, INNER, N_FP8 = 256, 128, 4
FP8 = preset("deepseek_fp8")


def fp8_layer():
    """(weights multiplied in FP8, tokens, ids, routing weights) of 8 * N_FP8 tokens."""
    rng = np.random.default_rng(7)
    shapes = {"w_gate_edf": (E, WIDE, INNER), "w_up_edf": (E, WIDE, INNER), "w_down_efd": (E, INNER, WIDE)}
    p = {}
    for name, shape in shapes.items():
        operand = quantise_weight(jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32), FP8)[0]
        p[name] = Quantised(None, operand, None, FP8, shape)
    x = rng.normal(size=(8 * N_FP8, WIDE)).astype(np.float32)
    ids = routings(8 * N_FP8)["tokens without experts"].astype(np.int32)
    return p, x, ids, rng.uniform(0.1, 1, ids.shape).astype(np.float32)


@pytest.mark.parametrize(("combine", "bound"), [("same", 2**-9), ("bf16", 2**-8)])
def test_low_latency_in_fp8_equals_the_normal_exchange_and_one_device(combine, bound):
    """The same bytes are multiplied by the same blocks; float32 sums differ in their order, by some 1e-7, which moves one of
    the 1e4 values of SwiGLU's results to another E4M3 number now and then: by 1/16, so 7e-4 of their norm. In BF16, partial
    sums are rounded inside the node and between nodes, each of them by 2^-9 at most."""
    args = fp8_layer()
    wire = Wire(FP8.dispatch, combine)
    few, many = (on_mesh(d, (4, 2), 4)(*args) for d in (LowLatency(wire=wire), Ragged(wire=wire)))
    one = np.asarray(jax.jit(routed_experts)(*args))
    assert np.abs(one).max() > 0.1
    assert difference(few, one) < bound and difference(few, many) < bound


def test_low_latency_over_peers_memory(monkeypatch):
    """The same rows at other places: sums in the same order. What lies where no row came reaches no token."""

    def with_garbage(x, rows, counts, axis):
        out, received = peer_exchange(x, rows, counts, axis)
        there = jnp.arange(out.shape[1])[None] < received[:, None]
        return jnp.where(there[..., None], out, jnp.uint32(0xFFFFFFFF)), received  # NaN, and ids of -2

    monkeypatch.setattr(peers, "peer_exchange", with_garbage)
    args, wire = fp8_layer(), Wire(FP8.dispatch, "bf16")
    want, got = (on_mesh(LowLatency(wire=wire, peers=p), (2, 4), 4)(*args) for p in (False, True))
    np.testing.assert_array_equal(got, want)


def test_decoding_multiplies_by_the_masked_product_in_fp8(monkeypatch):
    """Gate, up and down, of the experts' FP8 weights and the rows' bytes, once each; counts say which rows are there."""
    seen = []

    def masked(a, a_scale, b, b_scale, masked_m, out_dtype):
        seen.append((a.shape, a.dtype, b.dtype, masked_m.shape))
        return fp8_grouped_gemm_masked(a, a_scale, b, b_scale, masked_m, out_dtype)

    monkeypatch.setattr(operands, "fp8_grouped_gemm_masked", masked)
    args = fp8_layer()
    on_mesh(LowLatency(wire=Wire(FP8.dispatch, "bf16")), (2, 4), 4).trace(*args)
    e4m3, room = jnp.float8_e4m3fn, 128  # for 32 tokens of all devices, rounded up
    assert seen == [((E // 8, room, d), e4m3, e4m3, (E // 8,)) for d in (WIDE, WIDE, INNER)]


def test_absent_rows_may_be_anything(monkeypatch):
    """What a kernel leaves in rows that nobody sent reaches no token."""

    def garbage(a, a_scale, b, b_scale, masked_m, out_dtype):
        out = fp8_grouped_gemm_masked(a, a_scale, b, b_scale, masked_m, out_dtype)
        there = jnp.arange(a.shape[1])[None] < masked_m[:, None]
        return jnp.where(there[..., None], out, jnp.nan)

    run = LowLatency(wire=Wire(FP8.dispatch))
    args = fp8_layer()
    want = np.asarray(on_mesh(run, (4, 2), 4)(*args))
    monkeypatch.setattr(operands, "fp8_grouped_gemm_masked", garbage)
    np.testing.assert_array_equal(on_mesh(run, (4, 2), 4)(*args), want)

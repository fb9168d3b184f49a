"""Replicas of experts: the result of one device, and tokens that are spread evenly.

Dims: n token (of all devices), k selected expert, e logical expert, c replica.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.low_latency import LowLatency
from deepseek_jax.parallel.exchange.placement import Placement
from tests.parallel.comparison import BOUND, difference
from tests.parallel.harness import (
    E,
    K,
    arrays,
    dense,
    on_mesh,
    routings,
    single_device,
    with_gradients,
)

SHAPE, N = (4, 2), 5
# Logical expert of each physical one: 8 devices with 3 each; experts 0 to 3 have three replicas, the others one.
LOGICAL = np.array([0, 4, 5, 1, 6, 7, 2, 8, 9, 3, 10, 0, 11, 1, 12, 2, 13, 3, 14, 0, 1, 15, 2, 3])


def placement():
    physical = [np.flatnonzero(e == LOGICAL) for e in range(E)]
    table = np.array([np.resize(ids, 3) for ids in physical], np.int32)
    return Placement(jnp.asarray(table), jnp.array([len(ids) for ids in physical], jnp.int32))


DISPATCHERS = {
    "two hops": lambda: Ragged(function=dense),
    "flat, in rounds": lambda: Ragged(mode="flat", function=dense, receive=2.0),
}


@functools.cache
def replicated():
    """Program: the gradient of a logical expert is the sum of those of its replicas."""

    def run(*args):
        placed = {
            name: functools.partial(make(), placement=placement()) for name, make in DISPATCHERS.items()
        }
        return {name: with_gradients(dispatcher)(*args) for name, dispatcher in placed.items()}

    def logical(p, x, w, g, ids):
        physical = jax.tree.map(lambda a: a[LOGICAL], p)
        out = on_mesh(run, SHAPE, 5)(physical, x, w, g, ids)
        summed = functools.partial(jax.ops.segment_sum, segment_ids=jnp.asarray(LOGICAL), num_segments=E)
        return {name: got | {"params": jax.tree.map(summed, got["params"])} for name, got in out.items()}

    return jax.jit(logical)


@pytest.mark.parametrize("routing", ["random", "all to one expert", "tokens without experts"])
def test_replicas_equal_the_logical_experts(routing):
    n = 8 * N
    p, x, w, g = arrays(n)
    ids = routings(n)[routing].astype(np.int32)
    want = single_device()(p, x, w, g, ids)
    for name, got in replicated()(p, x, w, g, ids).items():
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
            assert difference(a, b) < BOUND, f"{name}, {jax.tree_util.keystr(path)}"


def test_replicas_decode_as_the_logical_experts():
    n = 8 * N
    p, x, w, _ = arrays(n)
    ids = routings(n)["random"].astype(np.int32)
    run = on_mesh(functools.partial(LowLatency(), placement=placement()), SHAPE, 4)
    got = run(jax.tree.map(lambda a: a[LOGICAL], p), x, ids, w)
    assert difference(got, jax.jit(dense)(p, x, ids, w)) < BOUND


def test_replicas_share_an_experts_tokens_evenly():
    """On each device the replicas of an expert get the same number of tokens, or one more; the same each time, and over
    all devices too. Absent ids stay absent."""
    rng = np.random.default_rng(0)
    ids = np.where(rng.random((8, 30, K)) < 0.3, rng.integers(0, 4, (8, 30, K)), -1).astype(np.int32)
    ids[:, ::2, 0] = 3  # every other token: a rule by the token's number would send all to the same replica
    table, counts = placement()
    of_all = jax.vmap(lambda ids, rank: placement().physical(ids, rank))
    physical = np.asarray(of_all(ids, jnp.arange(8)))
    np.testing.assert_array_equal(np.where(physical < 0, -1, LOGICAL[physical]), ids)
    np.testing.assert_array_equal(physical, of_all(ids, jnp.arange(8)))
    for e in range(4):
        of_replica = (physical[..., None] == np.asarray(table)[e, : counts[e]]).sum((1, 2))
        assert np.ptp(of_replica, axis=1).max() <= 1
        assert np.ptp(of_replica.sum(0)) <= 8 // 2

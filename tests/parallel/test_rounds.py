"""Rounds of an exchange: bounded by one number, whatever the routing, and all of them together bring everything.

Dims: n token (of all devices), k selected expert, i round, p peer.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.hops import for_peers
from deepseek_jax.parallel.exchange.order import after
from deepseek_jax.parallel.exchange.transport import DISPATCH, at_last_hop
from deepseek_jax.parallel.pipeline.split_grad import split
from tests.parallel.comparison import BOUND, difference
from tests.parallel.harness import E, K, arrays, dense, on_mesh, single_device, with_gradients

NODES, LOCAL, N = 4, 2, 6
DEVICES, E_LOCAL = NODES * LOCAL, E // (NODES * LOCAL)


def skewed(share):
    """int32 [devices * N, K]: of each device's tokens, `share` go to the experts of one device, the others anywhere."""
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(E), (DEVICES * N, 1)), axis=1)[:, :K]
    favoured = np.arange(DEVICES * N) % N < share * N
    return np.where(favoured[:, None], [E - 1, E - 2, -1], ids).astype(np.int32)


def pairs_between(ids, mode):
    """(token, expert) pairs that a device sends to another by the last hop: [source, destination]."""
    device = np.where(ids < 0, -1, ids // E_LOCAL)
    to = (device[..., None] == np.arange(DEVICES)).sum(1).reshape(NODES, LOCAL, N, DEVICES).sum(2)
    if mode == "flat":
        return to.reshape(DEVICES, DEVICES)
    by_index = to.sum(
        0
    )  # the first hop brought them to the device of the same index in the destination's node
    return np.repeat(by_index[None], NODES, 0).reshape(DEVICES, DEVICES)


@functools.cache
def brought(mode, receive, rounds):
    """Program: ids -> (rounds needed, [rows sent, rows received, pairs] of each round [i, 3], numbers of the tokens that
    came [i, r]); and the sizes of the buffers."""
    sizes = {}

    def run(ids, number):
        plan = Ragged(mode=mode, receive=receive).plan(ids, E_LOCAL)
        message, out = at_last_hop((number, jnp.ones((N, K))), plan), []
        for i in range(rounds):
            here = plan.at_round(i)
            hop = here.hops[-1]
            came = DISPATCH.finish(for_peers(message, hop), here)
            counts = (hop.chunks.size.sum(), hop.live_r.sum(), (came.experts_rk >= 0).sum())
            out.append((jnp.stack(counts), came.x_rd[:, 0]))
            sizes.update(
                sent=len(hop.token_s), received=hop.rows, pairs=here.pairs, budget=plan.rounds.budget
            )
        counts, came = map(jnp.stack, zip(*out, strict=True))
        return plan.rounds.needed[None], counts[None], came[None]

    return on_mesh(run, (NODES, LOCAL), 2), sizes


@pytest.mark.parametrize(
    ("mode", "receive", "share", "rounds"),
    [
        ("two_hop", 4, 0, 1),
        ("two_hop", 4, 0.25, 2),
        ("two_hop", 3.3, 1, 5),
        ("flat", 2, 0, 3),
        ("flat", 2, 1, 6),
    ],
)
def test_every_round_is_bounded_and_together_they_bring_each_row_once(mode, receive, share, rounds):
    ids = skewed(share)
    run, sizes = brought(mode, receive, 6)
    needed, counts, came = jax.device_get(run(ids, np.arange(1, DEVICES * N + 1, dtype=np.float32)[:, None]))
    peers = LOCAL if mode == "two_hop" else DEVICES
    budget = int(np.ceil(receive * N / peers))
    between = pairs_between(ids, mode)
    assert sizes["budget"] == budget and set(needed) == {np.ceil(between.max() / budget)} == {rounds}
    assert sizes["sent"] <= peers * budget and sizes["received"] <= peers * budget
    assert sizes["pairs"] <= peers * (budget + E_LOCAL - 1)
    assert (counts <= [sizes["sent"], sizes["received"], sizes["pairs"]]).all()
    assert not counts[:, rounds:].any()
    for device in range(DEVICES):
        mine = (ids // E_LOCAL == device).any(1)
        got = came[device][came[device] > 0].astype(int) - 1
        assert sorted(got) == np.flatnonzero(mine).tolist()


@functools.cache
def sorted_rows_program():
    return on_mesh(with_gradients(Ragged(receive=3.3)), (NODES, LOCAL), 5)


@pytest.mark.parametrize(("share", "present", "rounds"), [(0, 0.5, 1), (0, 1, 2), (1, 1, 5)])
def test_experts_over_sorted_rows_sized_by_pairs(share, present, rounds):
    """The real experts, whose buffer holds the pairs of a round: result and gradients of one device."""
    p, x, w, g = arrays(DEVICES * N)
    ids = np.where(np.random.default_rng(1).random((DEVICES * N, K)) < present, skewed(share), -1)
    assert np.ceil(pairs_between(ids, "two_hop").max() / np.ceil(3.3 * N / LOCAL)) == rounds
    got, want = sorted_rows_program()(p, x, w, g, ids), single_device()(p, x, w, g, ids)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert difference(a, b) < BOUND, jax.tree_util.keystr(path)


def in_two_parts(p, x, w, g, ids):
    """The gradients of a pipeline, of parameters later. On CPU devices, one part after the other."""
    experts = Ragged(receive=4, function=dense, apart=True)
    apart = split(lambda p, _, x: experts(p, x[0], x[2], x[1]), p, (), (x, w, ids))
    y, saved = apart.forward(p, (), (x, w, ids))
    (dx, dw, _), cut = apart.backward(p, (), saved, after(g, y))
    assert not {w.size for w in jax.tree.leaves(p)} & {a.size for a in cut}
    return {"y": y, "params": apart.weights(p, (), after(cut, dx)), "x": dx, "weights": dw}


def test_weight_gradients_of_all_rounds_come_later():
    """Nothing of the size of a weight is handed over, whether there are further rounds or not."""
    p, x, w, g = arrays(DEVICES * N)
    run = on_mesh(in_two_parts, (NODES, LOCAL), 5)
    for share, rounds in ((0, 1), (1, 4)):
        ids = skewed(share)
        assert np.ceil(pairs_between(ids, "two_hop").max() / np.ceil(4 * N / LOCAL)) == rounds
        got, want = run(p, x, w, g, ids), single_device()(p, x, w, g, ids)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
            assert difference(a, b) < BOUND, (share, jax.tree_util.keystr(path))


def test_what_waits_depends_on_what_it_waits_for():
    """In the compiled program; what it waits for changes nothing, finite or not."""
    wait = jax.jit(lambda x, y: after(x, {"done": y}))
    x, y = np.float32([1.5, -2.5]), np.float32([np.nan, np.inf, 1])
    np.testing.assert_array_equal(wait(x, y), x)
    program = wait.lower(x, y).compile().as_text()
    entry = program[program.index("ENTRY") :]
    name = re.search(r"(%\S+) = f32\[3\]\S* parameter\(1\)", entry)[1]
    assert re.search(rf"\([^)]*{re.escape(name)}\b", entry[entry.index("parameter(1)") :])

"""The exchange: rows arrive where the plan says, backward is the transpose, formats are what the sender quantised.

Dims: n token of a device, d hidden, k selected expert, s row sent, r row received.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.low_latency import LowLatency
from deepseek_jax.parallel.exchange.ragged import Chunks, make_chunks, ragged_all_to_all
from deepseek_jax.parallel.exchange.transport import combine, dispatch
from deepseek_jax.parallel.exchange.wire import Wire, decode, encode, num_words, pack, unpack
from experiments.study.traffic import count_rows
from tests.parallel.harness import on_mesh

NODES, LOCAL = 4, 2
RANKS = NODES * LOCAL
JOINT = ("node", "local")
E_LOCAL, K, N = 2, 3, 5
D = 160  # a tile of 128 channels and a ragged one


def program(fn, n_args, **kwargs):
    return on_mesh(fn, (NODES, LOCAL), n_args, **kwargs)


def ids_of_all(seed=0):
    """int32 [devices * N, K], some absent"""
    rng = np.random.default_rng(seed)
    e = np.tile(np.arange(RANKS * E_LOCAL), (RANKS * N, 1))
    ids = rng.permuted(e, axis=1)[:, :K]
    return np.where(rng.random(ids.shape) < 0.2, -1, ids).astype(np.int32)


# --- one ragged all-to-all --------------------------------------------------------------------------------------

SENT, ROWS, MOST = 40, 40, 4


def by_hand(x, counts, per, stride):
    """What lands where, in loops over devices, chunks and rows."""
    out = np.zeros((RANKS, ROWS, *x.shape[2:]), x.dtype)
    for dst in range(RANKS):
        for j in range(per):
            place = j * stride
            for src in range(RANKS):
                start = counts[src, : dst * per + j].sum()
                for i in range(counts[src, dst * per + j]):
                    out[dst, place] = x[src, start + i]
                    place += 1
    return out


def written(x, chunks, per, rows):
    """What the native collective is defined to do: every device writes its chunks to its peers at `landing`."""
    out = np.zeros((RANKS, rows, *x.shape[2:]), x.dtype)
    for src in range(RANKS):
        for c in range(RANKS * per):
            at, size, to = (getattr(chunks, name)[src, c] for name in ("start", "size", "landing"))
            out[c // per, to : to + size] = x[src, at : at + size]
            back = (c // per, src * per + c % per)  # the same chunk as its receiver sees it
            assert (chunks.recv_start[back], chunks.recv_size[back], chunks.recv_origin[back]) == (
                to,
                size,
                at,
            )
    return out


@pytest.mark.parametrize("per", [1, 2])
def test_ragged_all_to_all_and_its_reverse(per):
    """Rows land as planned, and <a2a(x), y> = <x, a2a'(y)>: integers in float32, so exactly."""
    rng = np.random.default_rng(per)
    counts = rng.integers(0, MOST // per + 1, (RANKS, RANKS * per)).astype(np.int32)
    counts[2], counts[:, 3 * per] = 0, 0  # a device that sends nothing, and one that gets nothing in a chunk
    x = rng.integers(-9, 9, (RANKS, SENT, 3)).astype(np.float32)
    y = rng.integers(-9, 9, (RANKS, ROWS, 3)).astype(np.float32)
    stride = ROWS // per if per > 1 else 0

    def run(x, y, counts):
        chunks = make_chunks(counts, JOINT, stride)
        got, transpose = jax.vjp(lambda x: ragged_all_to_all(x, chunks, ROWS, MOST, JOINT), x)
        return got, transpose(y)[0], chunks

    tiled = np.tile(counts, (RANKS, 1))
    out = jax.device_get(program(run, 3)(x.reshape(-1, 3), y.reshape(-1, 3), tiled))
    got, back = (a.reshape(RANKS, -1, 3) for a in out[:2])
    chunks = Chunks(*(a.reshape(RANKS, -1) for a in out[2]))
    want = by_hand(x, counts, per, stride)
    assert want.any() and (want * y).sum() == (x * back).sum()
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(written(x, chunks, per, ROWS), want)
    np.testing.assert_array_equal(written(y, chunks.reverse(), per, SENT), back)


def lowered(platform, implementation):
    def run(x, counts):
        chunks = make_chunks(counts, JOINT)
        return ragged_all_to_all(x, chunks, ROWS, MOST, JOINT, implementation)

    shapes = (
        jax.ShapeDtypeStruct((RANKS * SENT, 3), jnp.float32),
        jax.ShapeDtypeStruct((RANKS * RANKS, RANKS), jnp.int32),
    )
    text = program(run, 2).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    return text.count("ragged_all_to_all") > 0, text.count("stablehlo.all_to_all") > 0


def test_the_platform_of_the_lowering_chooses():
    assert lowered("cuda", None) == (True, False)
    assert lowered("cpu", None) == (False, True)
    assert lowered("cuda", "dense") == (False, True)
    with pytest.raises(ValueError, match="implementation='nccl' is not one of"):
        Ragged(implementation="nccl")


# --- plans ------------------------------------------------------------------------------------------------------


@functools.cache
def planned(mode):
    """Row numbers of the tokens that each device receives, their expert ids, and how many rows each device sends to
    each peer of the first hop."""

    def run(ids, number):
        d = Ragged(mode=mode)
        plan = d.plan(ids, E_LOCAL)
        came = d.dispatch(number, jnp.zeros((N, K)), plan)
        return came.x_rd, came.experts_rk, plan.hops[0].chunks.size

    number = np.arange(1, RANKS * N + 1, dtype=np.float32)[:, None]
    rows, experts, counts = jax.device_get(program(run, 2)(ids_of_all(), number))
    return rows.reshape(RANKS, -1), experts.reshape(RANKS, -1, K), counts.reshape(RANKS, -1)


BOTH = pytest.mark.parametrize("mode", ["flat", "two_hop"])


@BOTH
def test_each_device_gets_each_of_its_tokens_once(mode):
    rows, experts, _ = planned(mode)
    ids = ids_of_all()
    for rank in range(RANKS):
        mine = (ids >= rank * E_LOCAL) & (ids < (rank + 1) * E_LOCAL)
        tokens = rows[rank].astype(int) - 1
        live = tokens >= 0
        assert sorted(tokens[live]) == np.flatnonzero(mine.any(1)).tolist()
        np.testing.assert_array_equal(
            experts[rank][live], np.where(mine, ids - rank * E_LOCAL, -1)[tokens[live]]
        )
        assert (experts[rank][~live] == -1).all()


def test_a_token_crosses_to_a_node_once():
    """The counts of the first hop are those of (token, node) pairs, not of (token, device) or (token, expert)."""
    node = np.where(ids_of_all() < 0, -1, ids_of_all() // (E_LOCAL * LOCAL)).reshape(RANKS, N, K)
    want = (node[..., None] == np.arange(NODES)).any(2).sum(1)  # [device, to node]
    np.testing.assert_array_equal(planned("two_hop")[2], want)
    assert want.sum() < planned("flat")[2].sum()


def test_the_exchange_sends_what_is_counted():
    """From the plans' own counts: rows between devices of different nodes."""
    rows = count_rows(ids_of_all(), np.arange(RANKS * N) // N, RANKS * E_LOCAL, NODES, LOCAL)
    flat = planned("flat")[2].reshape(NODES, LOCAL, NODES, LOCAL).sum((1, 3))  # from node, to node
    two_hop = planned("two_hop")[2].reshape(NODES, LOCAL, NODES).sum(1)
    between = ~np.eye(NODES, dtype=bool)
    assert rows.flat.sum() == flat[between].sum()
    assert rows.two_hop.sum() == two_hop[between].sum()


# --- formats ----------------------------------------------------------------------------------------------------


def raw(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("form", ["fp8", "fp8_ue8m0"])
@BOTH
def test_fp8_is_quantised_at_the_sender_and_exchanged_exactly(form, mode):
    """Bitwise: dispatch in FP8 = exact dispatch of the quantised and dequantised tokens; so for the gradient of a
    combine. The gradient of a dispatch travels as it is."""
    exact, quantised = Ragged(mode=mode), Ragged(mode=mode, wire=Wire(form))

    def both(d, first, x, w, y, g, ids):
        plan = d.plan(ids, E_LOCAL)
        moved, back = jax.vjp(lambda x, w: dispatch(x, w, plan)[:2], first(x), w)
        summed, forth = jax.vjp(lambda y: combine(y, plan), y)
        return moved, back((y, moved[1])), summed, forth(first(g))

    def run(*args):
        def as_sent(x):
            return decode(encode(x, form), form, x.dtype)

        return both(quantised, lambda x: x, *args), both(exact, as_sent, *args)

    rng = np.random.default_rng(3)
    x, g = (rng.normal(size=(RANKS * N, D)).astype(np.float32) * 10 ** rng.uniform(-3, 3, D) for _ in "xg")
    y = rng.normal(size=(RANKS * N * RANKS, D)).astype(np.float32)
    w = rng.uniform(size=(RANKS * N, K)).astype(np.float32)
    got, want = program(run, 5)(x.astype(np.float32), w, y, g.astype(np.float32), ids_of_all())
    assert raw(got) == raw(want)
    assert np.abs(np.asarray(got[0][0])).max() > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_combine_in_bf16_rounds_each_hop(dtype):
    def run(y, ids):
        exact, rounded = Ragged(mode="flat"), Ragged(mode="flat", wire=Wire(combine="bf16"))
        nearest = y.astype(jnp.bfloat16).astype(dtype)
        return combine(y, rounded.plan(ids, E_LOCAL)), combine(nearest, exact.plan(ids, E_LOCAL))

    y = jnp.asarray(np.random.default_rng(4).normal(size=(RANKS * N * RANKS, D)), dtype)
    got, want = program(run, 2)(y, ids_of_all())
    assert got.dtype == dtype and raw(got) == raw(want)


def test_messages_hold_any_parts():
    rng = np.random.default_rng(5)
    parts = (
        jnp.asarray(rng.normal(size=(3, 7)), jnp.float8_e4m3fn),
        jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
        jnp.zeros((3, 0), jnp.float32),
        jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16),
    )
    message, layout = pack(parts)
    assert message.shape == (3, sum(num_words(p.shape[1], p.dtype) for p in parts)) == (3, 2 + 2 + 0 + 3)
    assert raw(unpack(message, layout)) == raw(parts)


def test_formats_that_do_not_exist():
    with pytest.raises(
        ValueError, match=r"wire.dispatch='int8' is not one of \['same', 'bf16', 'fp8', 'fp8_ue8m0'\]"
    ):
        Wire("int8")
    with pytest.raises(ValueError, match=r"wire.combine='fp8' is not one of \['same', 'bf16'\]"):
        Wire(combine="fp8")


# --- low latency ------------------------------------------------------------------------------------------------


@functools.cache
def arrived(wire):
    """What the low-latency dispatch brings to each device, of tokens [RANKS * N, D]; and how many rows there are."""

    def run(ids, x, w):
        d = LowLatency(wire=Wire(wire))
        came = d.dispatch(x, w, d.plan(ids, E_LOCAL))
        return came.rows[:3], came.hop.live_r

    rng = np.random.default_rng(6)
    x = rng.normal(size=(RANKS * N, D)).astype(np.float32)
    w = rng.uniform(size=(RANKS * N, K)).astype(np.float32)
    rows, live = program(run, 3)(ids_of_all(), x, w)
    return x, w, jax.tree.map(lambda a: np.asarray(a).reshape(RANKS, RANKS * N, *a.shape[1:]), (rows, live))


@pytest.mark.parametrize("form", ["same", "fp8_ue8m0"])
def test_low_latency_brings_each_token_of_a_device_once(form):
    """In front, in the order of the senders; with the weights and ids of all its experts, those of others absent. Bit for
    bit what the sender quantised. No buffer is larger than all tokens of all devices."""
    x, w, ((x_rd, w_rk, ids_rk), live) = arrived(form)
    sent = np.asarray(jax.jit(lambda x: decode(encode(x, form), form, x.dtype))(x))
    ids = ids_of_all()
    for rank in range(RANKS):
        mine = (ids >= rank * E_LOCAL) & (ids < (rank + 1) * E_LOCAL)
        by_device = np.arange(RANKS * N).reshape(NODES, LOCAL, N).swapaxes(0, 1).reshape(-1)
        tokens = by_device[
            mine.any(1)[by_device]
        ]  # from each device of the node: those of all nodes at its index
        n = len(tokens)
        assert live[rank].tolist() == [True] * n + [False] * (RANKS * N - n) and 0 < n < RANKS * N
        np.testing.assert_array_equal(x_rd[rank, :n], sent[tokens])
        np.testing.assert_array_equal(w_rk[rank, :n], w[tokens])
        want = np.where(mine, ids - rank * E_LOCAL, -1)[tokens]
        np.testing.assert_array_equal(ids_rk[rank, :n], want)
        assert (ids_rk[rank, n:] == -1).all() and not x_rd[rank, n:].any()


def test_low_latency_between_nodes_is_of_fixed_sizes():
    """One all-to-all each way over the nodes, of a row per token and node; ragged ones and counts stay inside a node."""

    def run(ids, x, w):
        d = LowLatency(wire=Wire("fp8", "bf16"), implementation="native", function=lambda p, x, *_, **__: x)
        plan = d.plan(ids, E_LOCAL)
        return d.combine(d.experts({}, d.dispatch(x, w, plan), x, w, plan), plan)

    shapes = [((RANKS * N, K), jnp.int32), ((RANKS * N, D), jnp.bfloat16), ((RANKS * N, K), jnp.float32)]
    text = str(program(run, 3).trace(*(jax.ShapeDtypeStruct(*s) for s in shapes)).jaxpr)
    found = re.findall(r"\b(all_to_all|ragged_all_to_all|all_gather)\[(.*?)\]", text, re.DOTALL)
    axes = [(name, "node" in re.search(r"axis_name=(\(.*?\)|\w+)", params)[1]) for name, params in found]
    assert sorted(axes) == [
        ("all_gather", False),
        *[("all_to_all", True)] * 2,
        *[("ragged_all_to_all", False)] * 2,
    ]
    words = num_words(D, jnp.float8_e4m3fn) + 2 + 2 * K  # tokens with two scales, weights, ids
    assert f"u32[{NODES},{N},{words}]" in text and f"u32[{NODES},{N},{D // 2}]" in text

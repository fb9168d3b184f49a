"""Prefill and decode apart: two engines of one process, with real connections, beside one that does both. The long form, over
random traces, is `tests/serving/apart_traces.py`."""

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import threading
import time

import jax
import numpy as np
import pytest

from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import Sampling
from deepseek_jax.serving.transfer import prefill, receiving, wire
from deepseek_jax.serving.transfer.deadlines import Deadlines
from deepseek_jax.serving.transfer.direct import Direct
from deepseek_jax.serving.transfer.identity import fingerprint
from tests.serving.drafting_requests import PROMPTS, mixed, model
from tests.serving.tiny_engine import run
from tests.serving.two_servers import TwoServers, ids, not_held, plain

RNG = np.random.default_rng(5)
LONG = RNG.integers(0, 60, 200).tolist()  # four chunks, four pages
NEW = 8


@pytest.fixture(scope="module")
def servers():
    with TwoServers(name="servers") as made:
        yield made


def soon(good):
    """Whether it comes true in some seconds."""
    end = time.monotonic() + 10
    while not good() and time.monotonic() < end:
        time.sleep(0.01)
    return good()


def asked():
    """Greedy and sampled, with penalties, a grammar, stops, shared beginnings, of one token, in chunks."""
    long = [Request("long", LONG, NEW), Request("more", [*LONG[:130], 3, 4], NEW, Sampling(1.0), seed=3)]
    given = Request("given", LONG[:100], 4, prompt_logprobs=2, logprobs=1)
    greedy = [Request(f"greedy{i}", prompt, NEW) for i, prompt in enumerate(PROMPTS)]
    return [*long, given, *mixed(), *greedy]


@pytest.mark.parametrize("direct", [True, False])
def test_apart_is_together(direct):
    want = run(plain(), asked())
    with TwoServers(direct=direct) as made:
        got = made.run(asked())
        assert ids(got) == {name: [token.id for token in tokens] for name, tokens in want.items()}
        traffic = made.decode.engine.traffic
        way = "direct" if direct else "socket"
        assert set(traffic.moved) == {way} and traffic.moved == made.prefill.engine.traffic.moved
        assert not traffic.failed and made.prefill.engine.stats.generated == 0
        assert made.free()


def test_hits_of_both_sides_and_what_travels(servers):
    """Pages by count: cold, from the prefill server's cache, from where the decode server's own ends."""
    traffic, text = servers.decode.engine.traffic, RNG.integers(0, 60, 230).tolist()
    drop = lambda thread: thread.call(thread.engine.schedulers[0].pool.drop_cache)  # noqa: E731

    def one(prompt):
        before = traffic.pages, traffic.requests
        ((*_, last),) = servers.run([Request("a", prompt, 2)]).values()
        return traffic.pages - before[0], traffic.requests - before[1], last.cached_tokens

    assert one(text[:140]) == (3, 1, 0)
    drop(servers.decode)
    assert one(text[:140]) == (3, 1, 128)  # found by the prefill server
    assert one(text) == (2, 1, 128)  # found by both
    assert one(text) == (0, 0, 192)  # 38 tokens are left to compute
    assert one(text[:64]) == (0, 0, 0)  # 63 before the last one
    assert one([7]) == (0, 0, 0)
    drop(servers.prefill)
    assert one([*text[:130], *text[:100]]) == (2, 1, 128)  # found by the decode server
    assert servers.free()


def test_log_probabilities_of_a_prompt_travel(servers):
    request = Request("a", LONG[:100], 2, prompt_logprobs=3)
    made = plain()
    made.submit(request)
    want = [update.prompt for _ in range(20) for update in made.step() if update.prompt]
    got = [update.prompt for update in servers.run([request])["a"] if update.prompt]
    assert [[t.id for t in prompt] for prompt in got] == [request.prompt] == [[t.id for t in want[0]]]
    np.testing.assert_allclose(*([t.logprob for t in p[1:]] for p in (got[0], want[0])), atol=1e-4)
    assert [[i for i, _ in t.top] for t in got[0]] == [[i for i, _ in t.top] for t in want[0]]


@contextlib.contextmanager
def held_up(thread):
    """An engine that does nothing."""
    go, there = threading.Event(), threading.Event()
    thread.post(lambda: (there.set(), go.wait(30)))
    assert there.wait(10)
    try:
        yield
    finally:
        go.set()


def test_what_is_cancelled_ends_on_both_sides(servers):
    """While it is queued there, and while its pages come; and what was asked beside it is answered."""
    updates = []
    with held_up(servers.prefill):
        servers.decode.submit(Request("a", LONG[::-1], NEW), updates.append)
        assert soon(lambda: servers.server.requests == 1)
        servers.decode.abort("a")
        assert soon(lambda: servers.server.requests == 0)
    assert soon(servers.free) and [u.finish_reason for u in updates] == ["abort"]
    with held_up(servers.decode):
        servers.decode.post(lambda: servers.decode.engine.submit(Request("b", LONG[::-1], NEW)))
    servers.decode.abort("b")
    assert soon(servers.free) and soon(lambda: servers.server.requests == 0)
    assert len(ids(servers.run([Request("c", LONG[::-1], NEW)]))["c"]) == NEW


def test_a_stream_that_decodes_goes_on_while_pages_are_awaited(servers):
    """And a turn that finds nothing to do waits, instead of turning."""
    heard = []
    with held_up(servers.prefill):
        servers.decode.submit(Request("waits", RNG.integers(0, 60, 100).tolist(), NEW), heard.append)
        assert len(ids(servers.run([Request("goes", [3, 4], 30)]))["goes"]) == 30
        time.sleep(0.1)
        turns = servers.decode.engine.idle
        assert turns and not any(update.tokens for update in heard)
    assert soon(lambda: heard and heard[-1].finish_reason == "length")


def test_too_few_pages_on_either_side_lose_nothing():
    """Preempted on the decode side, some while they fetch; queued on the prefill side."""
    requests = [
        Request(str(i), RNG.integers(0, 60, 150 + i).tolist(), 60, Sampling(1.0), seed=i) for i in range(5)
    ]
    want = {name: [token.id for token in tokens] for name, tokens in run(plain(), requests).items()}
    with TwoServers() as made:
        for thread, pages in ((made.prefill, 4), (made.decode, 1)):
            assert thread.call(lambda t=thread, n=pages: t.engine.schedulers[0].pool.allocate(n))
        assert ids(made.run(requests)) == want
        assert made.decode.engine.stats.preemptions > 0
        for thread, pages in ((made.prefill, 4), (made.decode, 1)):
            assert soon(lambda t=thread, n=pages: t.engine.schedulers[0].pool.held == n)


# --- what goes wrong ---------------------------------------------------------------------------------------------


def ended(made, prompt=LONG):
    (update,) = made.run([Request("x", prompt, 2)])["x"]
    assert update.finish_reason == "error" and not update.tokens
    assert made.free()
    return update.code, update.error


@contextlib.contextmanager
def false_server(say):
    """Accepts connections and has `say` do with each what it likes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        say(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield "{}:{}".format(*listener.getsockname())
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def frame(kind, says, data=b""):
    text = json.dumps(says).encode()
    return wire._HEAD.pack(kind, len(text), len(data)) + text + data


def read_ask(connection):
    head = connection.recv(wire._HEAD.size, socket.MSG_WAITALL)
    _, length, size = wire._HEAD.unpack(head)
    return json.loads(connection.recv(length + size, socket.MSG_WAITALL)[:length])


QUICK = Deadlines(meet=0.5, queued=0.5, transfer=0.5, beat=0.1)


@pytest.fixture(scope="module")
def quick():
    with TwoServers(deadlines=QUICK, name="quick") as made:
        yield made


def taken(connection, **more):
    identity = read_ask(connection)["identity"]
    connection.sendall(frame(wire.TAKEN, {"identity": identity, "direct": None}) + more.pop("then", b""))
    return identity


BEATING = Deadlines(meet=0.5, queued=0.4, transfer=0.4, beat=0.1)


def beats(connection):
    """Says that it is alive, and nothing else."""
    with contextlib.suppress(OSError):
        for _ in range(100):
            connection.sendall(frame(wire.BEAT, {}))
            time.sleep(0.05)


def never(connection):
    taken(connection)
    beats(connection)


def garbage(connection):
    connection.sendall(os.urandom(1000))
    time.sleep(0.3)


FALSE = [
    (lambda c: None, "prefill_lost", "meeting: the connection ended"),
    (lambda c: time.sleep(0.5), "prefill_lost", "meeting: it was silent for 0.2 s"),
    (beats, "prefill_lost", "meeting: it took more than 0.5 s"),
    (garbage, "prefill_lost", "meeting: it sent what it must not"),
    (taken, "prefill_lost", "queued: the connection ended"),
    (lambda c: (taken(c), time.sleep(0.5)), "prefill_lost", "queued: it was silent for 0.2 s"),
    (never, "prefill_lost", "queued: it took more than 0.5 s"),
    (lambda c: taken(c, then=frame(wire.DONE, {"cached": 0})), "prefill_lost", "it ended after 0 of 4 pages"),
    (
        lambda c: taken(c, then=frame(wire.PAGES, {"first": 1, "count": 1, "direct": None})),
        "prefill_lost",
        "it sent what it must not: first=1",
    ),
    (
        lambda c: taken(c, then=wire._HEAD.pack(wire.PAGES, 2, 1 << 60) + b"{}"),
        "prefill_lost",
        "it sent what it must not: kind 3 of 2 and 1152921504606846976 bytes",
    ),
    (
        lambda c: taken(c, then=frame(wire.FAILED, {"code": "prefill_refused", "message": "full"})),
        "prefill_refused",
        "queued: full",
    ),
    (
        lambda c: (read_ask(c), c.sendall(frame(wire.TAKEN, {"identity": {}, "direct": None}))),
        "prefill_differs",
        "dtype is",
    ),
]


@pytest.mark.parametrize("say, code, error", FALSE)
def test_a_server_that_fails_ends_the_request_with_one_error(quick, say, code, error):
    right = quick.prefills.to
    with false_server(say) as quick.prefills.to:
        began = time.monotonic()
        got = ended(quick)
        assert got[0] == code and error in got[1] and time.monotonic() - began < 3
        assert f"prefill server {quick.prefills.to}, " in got[1]
    quick.prefills.to = right


def test_no_server_and_one_that_is_not_there(quick):
    right, quick.prefills.to = quick.prefills.to, None
    assert ended(quick) == ("prefill_missing", "no prefill server is known")
    for quick.prefills.to in ("127.0.0.1:1", "nowhere", "[::1]:x", "127.0.0.1:99999999999"):
        code, error = ended(quick)
        assert code == "prefill_lost" and "it cannot be reached" in error
    quick.prefills.to = right


def test_who_can_compute_alone_does():
    want = {"x": [token.id for token in run(plain(), [Request("x", LONG, NEW)])["x"]]}
    with TwoServers(alone=True, deadlines=QUICK) as made, false_server(taken) as false:
        for made.prefills.to in (None, "127.0.0.1:1", false):
            made.decode.call(made.decode.engine.schedulers[0].pool.drop_cache)
            assert ids(made.run([Request("x", LONG, NEW)])) == want
        assert dict(made.decode.engine.traffic.failed) == {"prefill_lost": 2}
        assert made.free()


def test_other_weights_and_a_server_that_ends():
    with TwoServers() as made:
        made.fetching._side._weights = "other"
        code, error = ended(made)
        assert code == "prefill_differs" and "weights is 'other' there and 'same' here" in error
        made.fetching._side._weights = "same"
        made.prefill.call(lambda: made.prefill.engine.load(made.prefill.engine.device.weights, 7))
        assert "version is 0 there and 7 here" in ended(made)[1]
        made.decode.call(lambda: made.decode.engine.load(made.decode.engine.device.weights, 7))
        assert len(ids(made.run([Request("a", LONG[:150], NEW)]))["a"]) == NEW
        made.server.drain()
        assert ended(made)[0] == "prefill_refused"


def test_a_pull_that_does_not_answer_is_left_alone(monkeypatch):
    """The pages come by the connection, and the next ones at once."""

    async def silent(self, *_):
        await asyncio.sleep(60)

    want = {"x": [token.id for token in run(plain(), [Request("x", LONG, NEW)])["x"]]}
    monkeypatch.setattr(Direct, "pull", silent)
    quick = dataclasses.replace(QUICK, direct=0.3, queued=20, transfer=20, beat=1)
    with TwoServers(direct=True, deadlines=quick) as made:
        assert ids(made.run([Request("x", LONG, NEW)])) == want
        assert set(made.decode.engine.traffic.moved) == {"socket"} and made.fetching._silent
        assert made.free()


ASK = {
    "id": "a",
    "first": 0,
    "end": 5,
    "salt": "",
    "priority": 0,
    "prompt_logprobs": None,
    "moved": 4,
    "direct": False,
}


def test_bad_bytes_harm_nobody(servers):
    """Random ones, cut ones, and asks with a wrong value in each field; then a good one is answered."""
    identity = servers.fetching._side.identity.__dict__
    ids_ = np.arange(6, dtype="<i4").tobytes()
    good = frame(wire.ASK, ASK | {"identity": identity}, ids_)
    bad = [RNG.bytes(n) for n in (1, 13, 100, 5000)] + [good[:20], good[:-1], b"GET / HTTP/1.1\r\n\r\n"]
    wrong = [("first", 1), ("end", 6), ("end", 0), ("end", 2.0), ("priority", 2**40), ("prompt_logprobs", 21)]
    wrong += [("salt", None), ("direct", 1), ("moved", 0), ("identity", []), ("id", 3), ("end", True)]
    bad += [frame(wire.ASK, ASK | {"identity": identity, name: value}, ids_) for name, value in wrong]
    bad += [frame(wire.ASK, ASK | {"identity": identity}, np.full(6, 10**6, "<i4").tobytes())]
    bad += [wire._HEAD.pack(wire.ASK, 10, 1 << 50), wire._HEAD.pack(wire.ASK, 1 << 31, 0)]
    bad += [frame(wire.ASK, {"deep": 0}).replace(b"0}", b"[" * 40000 + b"}")]
    for data in bad:
        with socket.create_connection(servers.server.address) as connection, contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(10)
            while connection.recv(1 << 16):
                pass
    with socket.create_connection(servers.server.address) as connection:
        connection.sendall(good)
        kinds = []
        while wire.DONE not in kinds:
            kind, length, size = wire._HEAD.unpack(connection.recv(wire._HEAD.size, socket.MSG_WAITALL))
            connection.recv(length + size, socket.MSG_WAITALL)
            kinds += [kind] * (kind != wire.BEAT)
    assert kinds == [wire.TAKEN, wire.PAGES, wire.DONE]
    assert soon(lambda: servers.server.requests == 0) and not_held(servers.prefill.engine)


def test_a_prompt_that_is_too_long_is_refused(servers):
    """By a server that is there, and not lost: by a message that says so, whatever it did not read."""
    longest = servers.prefill.engine.device.sizes.max_model_len
    asks = {"identity": servers.fetching._side.identity.__dict__, "end": longest}
    long = np.zeros(longest + (1 << 20), "<i4").tobytes()
    with socket.create_connection(servers.server.address) as connection:
        connection.settimeout(10)
        connection.sendall(frame(wire.ASK, ASK | asks, long))
        kind, length, size = wire._HEAD.unpack(connection.recv(wire._HEAD.size, socket.MSG_WAITALL))
        says = json.loads(connection.recv(length, socket.MSG_WAITALL))
    assert (kind, size, says["code"]) == (wire.FAILED, 0, "prefill_refused")
    assert f"its sequences have {longest} at most" in says["message"]


def test_who_comes_when_it_is_full_is_refused(servers, monkeypatch):
    monkeypatch.setattr(prefill, "_CONNECTIONS", 1)
    asks = {"identity": servers.fetching._side.identity.__dict__}
    with socket.create_connection(servers.server.address):
        assert soon(lambda: servers.server.requests == 1)
        with socket.create_connection(servers.server.address) as connection:
            connection.settimeout(10)
            connection.sendall(frame(wire.ASK, ASK | asks, np.zeros(6, "<i4").tobytes()))
            _, length, _ = wire._HEAD.unpack(connection.recv(wire._HEAD.size, socket.MSG_WAITALL))
            assert json.loads(connection.recv(length, socket.MSG_WAITALL))["code"] == "prefill_refused"
    assert soon(lambda: servers.server.requests == 0)


def test_who_says_what_nobody_asked_is_not_heard_on(servers):
    with socket.create_connection(servers.server.address) as connection, held_up(servers.prefill):
        says = ASK | {"identity": servers.fetching._side.identity.__dict__}
        connection.sendall(frame(wire.ASK, says, np.arange(6, dtype="<i4").tobytes()))
        assert soon(lambda: servers.server.requests == 1)

        def ended():
            with contextlib.suppress(OSError):
                connection.sendall(frame(wire.GOT, {"good": True}))
            return not servers.server.requests

        assert soon(ended)


def test_no_pages_of_other_weights_are_kept():
    """The prefill server's weights change between two chunks: what it computed before can be found, and nothing else."""
    with TwoServers(deadlines=Deadlines()) as made:
        engine = made.prefill.engine
        step = engine.step

        def changing():
            updates = step()
            if engine.schedulers[0].running:
                engine.step = step
                engine.load(engine.device.weights, 7)
            return updates

        engine.step = changing
        assert ended(made)[0] == "prefill_differs"
        assert made.decode.engine.schedulers[0].pool.cached <= 1


def test_nothing_comes_behind_half_a_message():
    """Or the reader would take it for pages."""

    async def main():
        here, there = socket.socketpair()
        channel = wire.Channel(here, QUICK)
        with there, contextlib.closing(channel):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await channel.send(wire.PAGES, {}, bytes(1 << 24))
            sent = 0
            there.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while got := len(there.recv(1 << 20)):
                    sent += got
            with pytest.raises(wire.WireError, match="cut off"):
                await channel.send(wire.FAILED, {"code": "prefill_lost", "message": ""})
            channel.say_end()
            with pytest.raises(BlockingIOError):
                there.recv(1)
            assert 0 < sent < 1 << 24

    asyncio.run(main())


def test_a_name_with_several_addresses(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (f"127.0.0.{i}", port)) for i in (2, 1)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
        connection = asyncio.run(receiving._connected(f"host:{port}"))
        assert connection.getpeername() == ("127.0.0.1", port)
        connection.close()


def test_a_fingerprint_is_of_the_numbers():
    """Wherever they are: on devices or on the host."""
    params, _ = model()
    here, on_host = fingerprint(params), jax.tree.map(np.asarray, params)
    assert fingerprint(on_host) == here == fingerprint(dict(reversed(on_host.items())))
    assert fingerprint(jax.tree.map(lambda x: np.float32(1.01) * x, on_host)) != here
    assert fingerprint({name: on_host[name] for name in list(on_host)[1:]}) != here

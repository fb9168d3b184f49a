"""What a router hears of the pages of the cache."""

import sys

import pytest

from deepseek_jax.serving.kv_events import KvEvents, written
from deepseek_jax.serving.pages import AllBlocksCleared, BlockRemoved, BlockStored, PagePool, page_keys


def test_pages_of_one_sequence_are_one_event():
    a, b, c, d = (bytes([i]) * 32 for i in range(4))
    events = [
        BlockStored(a, None, [1, 2]),
        BlockStored(b, a, [3, 4]),
        BlockStored(c, a, [5, 6]),
        BlockRemoved(d),
        BlockRemoved(a),
        AllBlocksCleared(),
        BlockStored(d, None, [7, 8]),
    ]
    assert written(events) == [
        ["BlockStored", [a, b], None, [1, 2, 3, 4], 64, None],
        ["BlockStored", [c], a, [5, 6], 64, None],
        ["BlockRemoved", [d, a]],
        ["AllBlocksCleared"],
        ["BlockStored", [d], None, [7, 8], 64, None],
    ]


def test_a_subscriber_hears_what_a_pool_does():
    zmq, msgpack = pytest.importorskip("zmq"), pytest.importorskip("msgpack")
    events = KvEvents("tcp://127.0.0.1:*")
    pool = PagePool(2, listener=events.listener(3))
    keys = page_keys(range(128))
    with zmq.Context() as context, context.socket(zmq.SUB) as heard:
        heard.setsockopt(zmq.SUBSCRIBE, b"")
        heard.connect(events.endpoint)

        def said(change) -> list:
            """The events of the messages until one comes: a subscription takes a while to be known."""
            for _ in range(100):
                change()
                if heard.poll(50):
                    topic, number, body = heard.recv_multipart()
                    seconds, batch, rank = msgpack.unpackb(body)
                    assert (topic, rank, len(number)) == (b"", 3, 8) and seconds > 1e9
                    return batch
            raise AssertionError("nothing was heard")

        assert said(pool.drop_cache)[-1] == ["AllBlocksCleared"]
        pages = pool.allocate(2)
        for i, page in enumerate(pages):
            pool.register(page, keys[i], keys[i - 1] if i else None, range(64 * i, 64 * i + 64))
        stored = ["BlockStored", keys, None, list(range(128)), 64, None]
        assert stored in said(lambda: None)
        pool.release(pages)
        assert pool.allocate(2) is not None
        assert ["BlockRemoved", keys[::-1]] in said(lambda: None)
    events.close()


def test_what_it_needs_and_cannot_do(monkeypatch):
    pytest.importorskip("zmq"), pytest.importorskip("msgpack")
    with pytest.raises(ValueError, match=r"KV events cannot go to 'tcp:/nowhere': "):
        KvEvents("tcp:/nowhere")
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ValueError, match=r"zmq is missing: pip install 'deepseek-jax\[kv-events\]'"):
        KvEvents("tcp://127.0.0.1:*")

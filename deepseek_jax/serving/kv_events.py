"""Tells routers over ZeroMQ which prefixes lie in the cache, in vLLM's form.

A message has three frames: a topic, the number of the message (8 bytes, big-endian), and a batch in msgpack:
[seconds since 1970, events, rank]. Events are ["BlockStored", keys, parent's key, token ids, tokens of a page, null],
["BlockRemoved", keys] and ["AllBlocksCleared"]; keys are SHA-256 digests.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from deepseek_jax.checks import shown
from deepseek_jax.model.cache import PAGE
from deepseek_jax.serving.pages import AllBlocksCleared, BlockRemoved, BlockStored, Event

_SECONDS = 0.02  # in which events are gathered into one message


def _libraries() -> tuple[Any, Any]:
    """(msgpack, zmq). Raises ValueError where they are missing."""
    try:
        import msgpack
        import zmq
    except ImportError as error:
        raise ValueError(
            f"KV events need msgpack and pyzmq, and {error.name} is missing: pip install 'deepseek-jax[kv-events]'"
        ) from error
    return msgpack, zmq


class KvEvents:
    """Publishes events of page pools, from a thread of its own.

    Args:
        endpoint: to bind, as "tcp://*:5557".

    Raises ValueError for one that cannot be bound, or if a library is missing.
    """

    def __init__(self, endpoint: str):
        self._msgpack, zmq = _libraries()
        self._socket = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ValueError(f"KV events cannot go to {shown(endpoint)}: {error}") from error
        self._events: queue.SimpleQueue[tuple[int, Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kv events", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """Where it is bound, the port that was chosen for "*" included."""
        return self._socket.last_endpoint.decode()

    def listener(self, rank: int) -> Callable[[Event], None]:
        """Of the pool of a rank (`PagePool.listener`)."""
        return lambda event: self._events.put((rank, event))

    def close(self) -> None:
        """When all events are sent."""
        self._events.put(None)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        number, more = 0, True
        while more:
            batch = [self._events.get()]
            time.sleep(_SECONDS)
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._events.get(block=False))
            more = None not in batch
            events = [entry for entry in batch if entry is not None]
            for rank in sorted({rank for rank, _ in events}):
                body = [time.time(), written(event for r, event in events if r == rank), rank]
                self._socket.send_multipart([b"", number.to_bytes(8, "big"), self._msgpack.packb(body)])
                number += 1


def written(events: Iterable[Event]) -> list[list[Any]]:
    """As they go out; pages that follow each other in one sequence are one event."""
    found: list[list[Any]] = []
    for event in events:
        last: list[Any] = found[-1] if found else [None]
        if isinstance(event, BlockStored):
            if last[0] == "BlockStored" and last[1][-1] == event.parent:
                last[1].append(event.key)
                last[3].extend(event.tokens)
            else:
                found.append(["BlockStored", [event.key], event.parent, list(event.tokens), PAGE, None])
        elif isinstance(event, BlockRemoved):
            if last[0] == "BlockRemoved":
                last[1].append(event.key)
            else:
                found.append(["BlockRemoved", [event.key]])
        elif isinstance(event, AllBlocksCleared):
            found.append(["AllBlocksCleared"])
    return found

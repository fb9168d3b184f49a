"""Messages of a connection: a kind, an object of JSON, and bytes.

A message begins with 13 bytes: kind (1), length of the object (4) and of the bytes (8), big-endian. A reader says how many bytes
it takes; anything else, from whoever it is, ends the connection with a `WireError` before memory is taken for it.

| kind | from | object | bytes |
|---|---|---|---|
| ASK | decode | `id`, for logs; identity; `first`: page from which on it needs them; `end`: tokens to compute; salt, priority, prompt_logprobs; `moved`: pages that a message may have; `direct`: whether it can pull | token ids, int32 |
| TAKEN | prefill | identity; `direct`: port to pull from, if pages can be | |
| PAGES | prefill | `first`, `count`; `direct`: number to pull by, or null | pages [count, layer, token, width], unless they are pulled |
| GOT | decode | `good`: whether the pull came; if not, they are sent as bytes | |
| DONE | prefill | `cached`: tokens that were found in its prefix cache | log-probabilities (`given.py`) |
| FAILED | prefill | `code`, `message` | |
| END | decode | of a request that is not wanted any more | |
| BEAT | both | | |

Integers that stand for floats, or numbers beyond 2^53, are in no object. Nothing that is read is executed or unpickled.
"""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from deepseek_jax.checks import shown
from deepseek_jax.json_files import parse_object
from deepseek_jax.serving.transfer.deadlines import Deadlines

ASK, TAKEN, PAGES, GOT, DONE, FAILED, BEAT, END = range(1, 9)
_HEAD = struct.Struct("!BIQ")
_LONGEST = 1 << 16  # bytes of an object


class WireError(Exception):
    """The other side ended, was silent, or said what it must not say."""


class Message(NamedTuple):
    """size: of the bytes that follow, which have not been read."""

    kind: int
    says: dict[str, Any]
    size: int


class Channel:
    """A connection, on the event loop on which it is made.

    Whoever reads hears whether the other side is alive. Writing may take as long as a transfer: the other side may be alive, and
    its engine busy.
    """

    def __init__(self, connection: socket.socket, deadlines: Deadlines):
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._silence, self._most = connection, deadlines.silence, deadlines.transfer
        self._loop, self._sending = asyncio.get_running_loop(), asyncio.Lock()
        self._cut = False  # in the middle of a message, behind which no other can come

    def close(self) -> None:
        self._socket.close()

    async def send(self, kind: int, says: dict[str, Any] | None = None, data: Any = b"") -> None:
        """data: an array's or other bytes, which are not copied."""
        text = json.dumps(says or {}).encode()
        view = memoryview(data).cast("B")
        async with self._sending:
            if self._cut:
                raise WireError("a message was cut off")
            self._cut = True
            await self._write(memoryview(_HEAD.pack(kind, len(text), len(view)) + text))
            await self._write(view)
            self._cut = False

    def say_end(self) -> None:
        """Says END, if that can be said at once, before the connection is closed."""
        if not (self._cut or self._sending.locked()):
            with contextlib.suppress(OSError):
                self._socket.send(_HEAD.pack(END, 2, 0) + b"{}")

    async def receive(self, known: dict[int, int]) -> Message:
        """The next message but BEAT. known: how many bytes each kind that may come now may have."""
        while True:
            kind, length, size = _HEAD.unpack(await self.read(_HEAD.size))
            most = 0 if kind == BEAT else known.get(kind)
            if most is None or length > _LONGEST or size > most:
                raise WireError(f"it sent what it must not: kind {kind} of {length} and {size} bytes")
            try:
                says = parse_object(bytes(await self.read(length)), "a message")
            except ValueError as error:
                raise WireError(f"it sent what it must not: {error}") from error
            if kind != BEAT:
                return Message(kind, says, size)

    async def read(self, size: int) -> memoryview:
        room = memoryview(bytearray(size))
        await self.read_into(room)
        return room

    async def skip(self, size: int) -> None:
        """Reads bytes, and keeps none."""
        room = memoryview(bytearray(min(size, 1 << 16)))
        while size:
            some = room[: min(size, len(room))]
            await self.read_into(some)
            size -= len(some)

    async def read_into(self, room: memoryview) -> None:
        """Fills the room."""
        with _saying_what(f"it was silent for {self._silence:g} s"):
            while len(room):
                async with asyncio.timeout(self._silence):
                    n = await self._loop.sock_recv_into(self._socket, room)
                if not n:
                    raise WireError("the connection ended")
                room = room[n:]

    async def _write(self, view: memoryview) -> None:
        with _saying_what(f"it read nothing for {self._most:g} s"):
            async with asyncio.timeout(self._most):
                await self._loop.sock_sendall(self._socket, view)

    @contextlib.asynccontextmanager
    async def beating(self, beat: float) -> AsyncIterator[None]:
        """Says that it is alive, as long as the block runs."""
        task = asyncio.ensure_future(self._beat(beat))
        try:
            yield
        finally:
            task.cancel()

    async def _beat(self, seconds: float) -> None:
        with contextlib.suppress(WireError):  # whoever reads will hear of it
            while True:
                await asyncio.sleep(seconds)
                if not self._sending.locked():
                    await self.send(BEAT)


@contextlib.contextmanager
def _saying_what(late: str) -> Any:
    try:
        yield
    except TimeoutError as error:
        raise WireError(late) from error
    except OSError as error:
        raise WireError(f"the connection ended: {error.strerror or error}") from error


def field(says: dict[str, Any], name: str, good: Callable[[Any], bool]) -> Any:
    """A value of a message. Raises WireError unless it is good."""
    value = says.get(name)
    if not good(value):
        raise WireError(f"it sent what it must not: {name}={shown(value)}")
    return value


def count(low: int, high: int) -> Callable[[Any], bool]:
    """Whether a value is an integer in [low, high]."""
    return lambda value: type(value) is int and low <= value <= high


def text(longest: int) -> Callable[[Any], bool]:
    """Whether a value is a text of at most so many characters."""
    return lambda value: isinstance(value, str) and len(value) <= longest

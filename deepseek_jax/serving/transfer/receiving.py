"""A request of a decode server on its way to a prefill server, and the pages on their way back."""

import asyncio
import contextlib
import functools
import hashlib
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek_jax.checks import shown
from deepseek_jax.model.cache import PAGE
from deepseek_jax.serving.request import PromptToken
from deepseek_jax.serving.steps import Running
from deepseek_jax.serving.transfer import wire
from deepseek_jax.serving.transfer.deadlines import within
from deepseek_jax.serving.transfer.direct import Direct
from deepseek_jax.serving.transfer.errors import KINDS, PrefillLostError, PrefillRefusedError
from deepseek_jax.serving.transfer.given import packed_size, unpacked
from deepseek_jax.serving.transfer.loop import LoopThread
from deepseek_jax.serving.transfer.side import LOGGER, Side
from deepseek_jax.serving.transfer.traffic import DIRECT, SOCKET
from deepseek_jax.serving.transfer.wire import Channel, Message, WireError, count, field, text

_AHEAD = 4  # blocks of pages of a request that may wait for the engine's next turn
_SALT = 256  # characters


class Fetch:
    """What is asked for a sequence (`steps.py: Fetch`).

    Attributes:
        rank: whose pages are written.
        address: of the prefill server.
        tokens: of the prompt; first: page from which on it is asked for; end: tokens whose latents are.
        state: "meeting", "queued", "transferring".
        way, pages, bytes, seconds: what came, in how long, by the way that the last pages took.
    """

    def __init__(self, loop: LoopThread, rank: int, running: Running, address: str, end: int):
        self._loop, self.rank, self.running, self.address = loop, rank, running, address
        self.tokens = list(running.tokens)
        self.first, self.end = running.computed // PAGE, end
        self.state, self.cancelled = "meeting", False
        self.task: asyncio.Task[None] | None = None
        self.way, self.pages, self.bytes, self.seconds = SOCKET, 0, 0, 0.0

    def cancel(self) -> None:
        self.cancelled = True
        self._loop.call(self._cancel)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def add(self, way: str, pages: int, size: int, seconds: float) -> None:
        self.way = way
        self.pages += pages
        self.bytes += size
        self.seconds += seconds

    def figures(self) -> dict[str, Any]:
        """For its line in the log."""
        rate = round(self.bytes / max(1e-9, self.seconds) / 1e6, 1)
        return {
            "prefill": self.address,
            "id": self.running.request.id,
            "state": self.state,
            "pages": self.pages,
            "way": self.way,
            "mb_s": rate,
        }


Arrive = Callable[[Fetch, int, int, Any, Callable[[], None]], None]
Rest = tuple[
    int, dict[int, PromptToken]
]  # tokens found in the other's cache; tokens with log-probabilities, by position


class Receiving:
    """Gets all of a prompt over a connection.

    Args:
        silent: addresses whose pulls do not answer; one that does not is added.
        arrive: is called on the engine's thread with (fetch, first page, how many, block, what to call when they are written).
    """

    def __init__(self, side: Side, fetch: Fetch, silent: set[str], arrive: Arrive):
        self._side, self._fetch, self._silent, self._arrive = side, fetch, silent, arrive
        self._come = fetch.first  # pages
        self._ahead = asyncio.Semaphore(_AHEAD)
        self._direct: Direct | None = None
        self._from = ""  # where pages are pulled

    async def run(self) -> Rest:
        """What came beside pages. Raises TransferError or WireError."""
        fetch, limits = self._fetch, self._side.deadlines
        async with within(limits.meet):
            connection = await _connected(fetch.address)
        self._channel = Channel(connection, limits)
        try:
            async with self._channel.beating(limits.beat):
                async with within(limits.meet):
                    await self._meet(connection)
                fetch.state = "queued"
                async with within(limits.queued):
                    message = await self._next()
                fetch.state = "transferring"
                async with within(limits.transfer):
                    while message.kind == wire.PAGES:
                        await self._pages(message)
                        message = await self._next()
                    return await self._done(message)
        except asyncio.CancelledError:
            self._channel.say_end()
            raise
        finally:
            self._channel.close()

    async def _meet(self, connection: socket.socket) -> None:
        side, fetch, request = self._side, self._fetch, self._fetch.running.request
        if side.directs is not None and fetch.address not in self._silent:
            self._direct = side.directs.at(connection.getsockname()[0])
        says = {
            "id": request.id[:_SALT],
            "identity": side.identity.__dict__,
            "first": fetch.first,
            "end": fetch.end,
            "salt": _short(request.salt),
            "priority": max(-(2**31) + 1, min(request.priority, 2**31 - 1)),
            "prompt_logprobs": request.prompt_logprobs,
            "moved": side.moved,
            "direct": self._direct is not None,
        }
        await self._channel.send(wire.ASK, says, np.array(fetch.tokens, "<i4"))
        taken = (await self._heard({wire.TAKEN: 0})).says
        side.check(field(taken, "identity", lambda value: isinstance(value, dict)))
        port = field(taken, "direct", lambda port: port is None or count(1, 65535)(port))
        self._direct = None if port is None else self._direct
        self._from = f"{fetch.address.rpartition(':')[0]}:{port}"

    async def _heard(self, known: dict[int, int]) -> Message:
        """A message of the prefill server. Raises the TransferError that it tells."""
        message = await self._channel.receive({**known, wire.FAILED: 0})
        if message.kind == wire.FAILED:
            code = field(message.says, "code", text(64))
            raise KINDS.get(code, PrefillRefusedError)(field(message.says, "message", text(1000)))
        return message

    async def _next(self) -> Message:
        return await self._heard({wire.PAGES: self._side.moved * self._side.page, wire.DONE: self._given})

    @property
    def _given(self) -> int:
        """Bytes of log-probabilities."""
        return packed_size(self._fetch.end, self._fetch.running.request.prompt_logprobs)

    @property
    def _all(self) -> int:
        """Pages, those that were there before included."""
        return -(-self._fetch.end // PAGE)

    async def _pages(self, message: Message) -> None:
        """Hands them to the engine."""
        most = min(self._side.moved, self._all - self._come)
        field(message.says, "first", count(self._come, self._come))
        n = field(message.says, "count", count(1, most))
        number = field(message.says, "direct", lambda value: value is None or count(0, 2**53)(value))
        if number is None:
            block: Any = await self._received(message, n)
        else:
            block = await self._pulled(number, n)
            await self._channel.send(wire.GOT, {"good": block is not None})
            if block is None:
                return  # they come as bytes
        await self._ahead.acquire()
        arrive = functools.partial(self._arrive, self._fetch, self._come, n, block, self._ahead.release)
        self._side.thread.post(arrive)
        self._come += n

    async def _received(self, message: Message, n: int) -> np.ndarray:
        if message.size != n * self._side.page:
            raise WireError(f"it sent {message.size} bytes for {n} pages of {self._side.page}")
        began = time.monotonic()
        block = np.empty(self._side.block.shape, self._side.block.dtype)
        await self._channel.read_into(memoryview(block.reshape(-1).view(np.uint8).data)[: message.size])
        self._add(SOCKET, n, message.size, began)
        return block

    async def _pulled(self, number: int, n: int) -> Any:
        """None if it does not answer: then it is not asked again."""
        began = time.monotonic()
        if self._direct is None:
            return None
        device = self._side.engine.device.place(self._fetch.rank)
        try:
            async with asyncio.timeout(self._side.deadlines.direct):
                block = await self._direct.pull(self._from, number, self._side.block, device)
        except (TimeoutError, OSError) as error:
            self._silent.add(self._fetch.address)
            self._direct = None
            fields = {"prefill": self._fetch.address, "error": str(error) or "it does not answer"}
            LOGGER.warning("pages cannot be pulled: they come by the connection", extra={"fields": fields})
            return None
        self._add(DIRECT, n, block.nbytes, began)
        return block

    def _add(self, way: str, pages: int, size: int, began: float) -> None:
        seconds = time.monotonic() - began
        self._fetch.add(way, pages, size, seconds)
        self._side.traffic.add(way, pages, size, seconds)

    async def _done(self, message: Message) -> Rest:
        fetch = self._fetch
        if self._come < self._all:
            raise WireError(f"it ended after {self._come} of {self._all} pages")
        if message.size != self._given:
            raise WireError(f"it sent {message.size} bytes of log-probabilities instead of {self._given}")
        cached = field(message.says, "cached", count(0, len(fetch.tokens)))
        data = await self._channel.read(message.size)
        return cached, unpacked(data, fetch.tokens, fetch.end, fetch.running.request.prompt_logprobs)


async def _connected(address: str) -> socket.socket:
    """Raises PrefillLostError."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        *others, last = found
        for one in others:  # of a name that has several, of which it may listen at one
            with contextlib.suppress(OSError):
                return await _connected_at(*one)
        return await _connected_at(*last)
    except (OSError, ValueError, OverflowError) as error:
        raise PrefillLostError(f"it cannot be reached at {shown(address)}: {error}") from error


async def _connected_at(family: int, kind: int, protocol: int, _: str, at: Any) -> socket.socket:
    connection = socket.socket(family, kind, protocol)
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, at)
    except BaseException:
        connection.close()
        raise
    return connection


def _short(salt: str) -> str:
    return salt if len(salt) <= _SALT else hashlib.sha256(salt.encode()).hexdigest()

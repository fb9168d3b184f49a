"""The client's side of an answer that goes through the router."""

import asyncio
import time
from collections.abc import Iterable

from starlette.types import Receive, Send

from deepseek_jax.serving.server.answer import DONE, EVENTS, KEEP_ALIVE, event
from deepseek_jax.serving.server.errors import ApiError

Headers = Iterable[tuple[bytes, bytes]]


class Client:
    """Attributes: started: whether anything was sent; until then an error has a status of its own. headers: of a stream, beside
    those that each has."""

    def __init__(self, send: Send):
        self._send, self._last = send, time.monotonic()
        self._unsent, self._done, self._sending = b"", False, asyncio.Lock()
        self.started, self.headers = False, ()  # type: bool, Headers

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """All of an answer."""
        self.started = True
        length = b"content-length", str(len(body)).encode()
        async with self._sending:
            await self._send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
            await self._end(body)

    async def events(self, data: bytes) -> None:
        """Whole events of a stream. If this is cancelled while a slow client is waited for, they go before the next ones."""
        self._unsent += data
        async with self._sending:
            if not self.started:
                self.started = True
                await self._send(
                    {"type": "http.response.start", "status": 200, "headers": [*EVENTS, *self.headers]}
                )
            if data := self._unsent:
                self._last = time.monotonic()
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
                self._unsent = self._unsent[len(data) :]

    async def done(self) -> None:
        """The end of a stream that is complete; if this is cancelled, it may be asked for again."""
        self._unsent += b"" if self._done else DONE
        self._done = True
        await self.events(b"")
        async with self._sending:
            await self._end(b"")

    async def _end(self, body: bytes) -> None:
        self._last = time.monotonic()
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, error: ApiError) -> None:
        """Raises it, if nothing was sent yet; otherwise it is the last event."""
        if not self.started:
            raise error
        await self.events(event(error.body()))
        async with self._sending:
            await self._end(b"")

    async def keep_alive(self, seconds: float) -> None:
        """Sends a comment whenever nothing was sent for so long; never returns."""
        while True:
            left = self._last + seconds - time.monotonic()
            if left > 0 or self._sending.locked():
                await asyncio.sleep(left if left > 0 else seconds / 4)
            else:
                await self.events(KEEP_ALIVE)


async def left(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass

"""The client's side of an answer that goes through the router."""

import asyncio
import time
from collections.abc import Iterable

from starlette.types import Receive, Send

from deepseek_jax.serving.server.answer import EVENTS, KEEP_ALIVE, event
from deepseek_jax.serving.server.errors import ApiError

Headers = Iterable[tuple[bytes, bytes]]


class Client:
    """Attributes: started: whether anything was sent; until then an error has a status of its own. headers: of a stream, beside
    those that each has."""

    def __init__(self, send: Send):
        self._send, self._last = send, time.monotonic()
        self.started, self.headers = False, ()  # type: bool, Headers

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """All of an answer."""
        self.started = True
        length = b"content-length", str(len(body)).encode()
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, data: bytes) -> None:
        """Whole events of a stream."""
        if not self.started:
            self.started = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": [*EVENTS, *self.headers]}
            )
        self._last = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Of a stream."""
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: ApiError) -> None:
        """Raises it, if nothing was sent yet; otherwise it is the last event."""
        if not self.started:
            raise error
        await self.events(event(error.body()))
        await self.end()

    async def keep_alive(self, seconds: float) -> None:
        """Sends a comment whenever nothing was sent for so long; never returns."""
        while True:
            left = self._last + seconds - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
            else:
                await self.events(KEEP_ALIVE)


async def left(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass

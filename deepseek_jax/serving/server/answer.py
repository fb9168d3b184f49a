"""How an answer goes out: whole, or as server-sent events while it comes. Either way a client that leaves ends it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from deepseek_jax.serving.server.generation import Generation
from deepseek_jax.serving.server.wire import Json, json_bytes

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_LONG = 3600.0  # seconds
CLIENT_LEFT = 499  # the status in the log; nobody is there to read it

EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # of nginx: pass on at once
)


class Form(Protocol):
    """How an endpoint writes what comes of a generation."""

    def whole(self) -> Json:
        """The answer when all has come."""
        ...

    def events(self) -> bytes:
        """Events for what is new; b"" where nothing is to be shown."""
        ...

    def last(self) -> bytes:
        """Events after all the others, but for [DONE]."""
        ...

    def figures(self) -> Json:
        """For the log."""
        ...


def event(value: Any) -> bytes:
    return b"data: " + json_bytes(value) + b"\n\n"


class Answer:
    """Runs a generation and sends what comes of it. An ASGI application; raises ApiError if nothing has been sent yet."""

    def __init__(self, generation: Generation, form: Form, stream: bool, keep_alive: float):
        self._generation, self._form = generation, form
        self._streams, self._keep_alive = stream, keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        figures = scope.setdefault("state", {}).setdefault("figures", {})
        try:
            with self._generation as generation:
                async with _watched(receive, generation):
                    await (self._stream(send) if self._streams else self._whole(send))
                if generation.gone and not generation.ended:
                    figures["status"] = CLIENT_LEFT
        finally:
            figures |= self._form.figures()

    async def _whole(self, send: Send) -> None:
        generation = self._generation
        while not (generation.ended or generation.gone or generation.error):
            await generation.news(_LONG)
        if generation.error:
            raise generation.error
        if generation.ended:
            body = json_bytes(self._form.whole())
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        generation = self._generation
        await generation.news(self._keep_alive)  # what goes wrong before still has a status of its own
        if generation.error:
            raise generation.error
        await send({"type": "http.response.start", "status": 200, "headers": list(EVENTS)})
        async for part in self._parts():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _parts(self) -> AsyncIterator[bytes]:
        generation, sent = self._generation, 0.0
        while not generation.gone:
            ended, error = generation.ended, generation.error
            part = self._form.events()
            if error:
                yield part + event(error.body())
                return
            if ended:
                yield part + self._form.last() + DONE
                return
            if not part and time.monotonic() - sent >= self._keep_alive:
                part = KEEP_ALIVE
            if part:
                yield part
                sent = time.monotonic()
            await generation.news(self._keep_alive)


@contextlib.asynccontextmanager
async def _watched(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Tells the generation when the client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.leave()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

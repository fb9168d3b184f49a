"""What the scripts that load a server share: one request and what came of it, many at a time."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NamedTuple

import httpx

TIMEOUT = httpx.Timeout(120.0)


class Outcome(NamedTuple):
    """status: of HTTP. events: of a stream, but for [DONE]. body: of anything else. done: whether [DONE] came. first: seconds to
    the first event; seconds: in all."""

    status: int
    headers: httpx.Headers
    events: list[dict[str, Any]]
    body: bytes
    done: bool
    first: float
    seconds: float

    @property
    def value(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """Of the first choice of a stream of completions."""
        return "".join(c.get("text", "") for e in self.events for c in e["choices"] if c["index"] == 0)

    @property
    def usage(self) -> dict[str, Any]:
        return self.events[-1]["usage"] if self.events else self.value["usage"]


def client(url: str, many: int = 1000) -> httpx.AsyncClient:
    """Each request has a connection of its own: one that is kept may be closed by the server as the next request is sent."""
    limits = httpx.Limits(max_connections=many, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits)


async def post(http: httpx.AsyncClient, path: str, body: Any) -> Outcome:
    """Reads the whole answer."""
    began, events, done, first = time.perf_counter(), [], False, 0.0
    async with http.stream("POST", path, json=body) as response:
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raw, now = await response.aread(), time.perf_counter() - began
            return Outcome(response.status_code, response.headers, [], raw, False, now, now)
        async for data in events_of(response):
            first = first or time.perf_counter() - began
            done = data == "[DONE]"
            if not done:
                events.append(json.loads(data))
    seconds = time.perf_counter() - began
    return Outcome(response.status_code, response.headers, events, b"", done, first, seconds)


async def events_of(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line[6:]


async def at_most(many: int, jobs: Iterable[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """What the jobs return, in their order, so many at a time."""
    gate = asyncio.Semaphore(many)

    async def one(job: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await job()

    return list(await asyncio.gather(*map(one, jobs)))

"""Pages of a prompt on their way to the decode server that asked for it."""

import asyncio
import concurrent.futures
import time
from typing import Any

import numpy as np

from deepseek_jax.serving.request import Update
from deepseek_jax.serving.transfer import wire
from deepseek_jax.serving.transfer.deadlines import within
from deepseek_jax.serving.transfer.direct import Direct
from deepseek_jax.serving.transfer.loop import LoopThread
from deepseek_jax.serving.transfer.side import Side
from deepseek_jax.serving.transfer.traffic import DIRECT, SOCKET
from deepseek_jax.serving.transfer.wire import Channel


class Job:
    """A request of a decode server (`request.py: Export`).

    Attributes:
        sent, end: see `Export`.
        moved: pages of a message at most.
        version: of the weights when it was asked for.
        unsent: bytes of its pages that wait to be sent.
        direct: by which its pages can be pulled; None: they go as bytes. offered: some are, and nothing is heard of them yet.
        events: blocks of pages, then the last update, or what the engine raised.
        heard: what the other side says of the pages that were offered last.
    """

    def __init__(self, loop: LoopThread, tokens: list[int], first: int, end: int, moved: int, version: int):
        self._loop, self.tokens, self.version = loop, tokens, version
        self.first = self.sent = first
        self.end, self.moved, self.unsent = end, moved, 0
        self.direct: Direct | None = None
        self.offered = False
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.heard: asyncio.Queue[bool] = asyncio.Queue()

    def take(self, first: int, count: int, block: Any) -> None:
        self._loop.call(self._put, (first, count, block), block.nbytes)

    def update(self, update: Update) -> None:
        if update.finish_reason is not None:
            self._loop.call(self._put, update)

    def refused(self, error: Exception) -> None:
        self._loop.call(self._put, error)

    def _put(self, event: Any, size: int = 0) -> None:
        self.unsent += size
        self.events.put_nowait(event)


class Sending:
    """Sends them over a connection, one block after the other. workers: wait for what is on its way to the host."""

    def __init__(self, side: Side, channel: Channel, job: Job, workers: concurrent.futures.Executor):
        self._side, self._channel, self._job, self._workers = side, channel, job, workers

    async def pages(self, first: int, n: int, block: Any) -> None:
        """The first n of a block, which are those of the prompt from `first` on."""
        job, began = self._job, time.monotonic()
        if job.direct is not None and n <= job.moved:
            if await self._offered(job.direct, first, n, block):
                self._side.traffic.add(DIRECT, n, block.nbytes, time.monotonic() - began)
                return
            job.direct = None
        host = await asyncio.get_running_loop().run_in_executor(self._workers, np.asarray, block)
        began, page = time.monotonic(), self._side.page
        data = memoryview(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
        for start in range(0, n, job.moved):
            some = min(job.moved, n - start)
            says = {"first": first + start, "count": some, "direct": None}
            await self._channel.send(wire.PAGES, says, data[start * page : (start + some) * page])
        self._side.traffic.add(SOCKET, n, n * page, time.monotonic() - began)

    async def _offered(self, direct: Direct, first: int, n: int, block: Any) -> bool:
        """Whether the other side pulled it."""
        good, number = False, direct.offer(block)
        try:
            self._job.offered = True
            await self._channel.send(wire.PAGES, {"first": first, "count": n, "direct": number})
            async with within(self._side.deadlines.transfer):
                good = await self._job.heard.get()
        finally:
            if not good:
                direct.take_back(number, block)
        return good

"""The prefill server's side: prompts of decode servers go through an engine, and their pages back.

Each connection is a request. It is queued in the engine like any other; what waits to be sent is bounded, beyond which new
ones wait before they enter the engine. Whatever ends the connection ends the request, and the other way round.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import socket
import time
from typing import Any

import numpy as np

from deepseek_jax.model.cache import PAGE
from deepseek_jax.serving.request import TOP, Request, Update
from deepseek_jax.serving.thread import EngineThread
from deepseek_jax.serving.transfer import wire
from deepseek_jax.serving.transfer.deadlines import Deadlines
from deepseek_jax.serving.transfer.errors import (
    NotWantedError,
    PrefillDiffersError,
    PrefillLostError,
    PrefillRefusedError,
    TransferError,
)
from deepseek_jax.serving.transfer.given import packed
from deepseek_jax.serving.transfer.loop import LoopThread
from deepseek_jax.serving.transfer.sending import Job, Sending
from deepseek_jax.serving.transfer.side import LOGGER, Side
from deepseek_jax.serving.transfer.wire import Channel, WireError, count, field, text

_UNSENT = 2 << 30  # bytes of pages that may wait to be sent before new requests wait
_CONNECTIONS = 1024
_TOLD = 5.0  # seconds that the other side may take to hear of an error
_RANGE = 2**31 - 1
_NAME = 1 << 12  # characters
_ASK = 1 << 26  # bytes of token ids that are heard to their end, if only to be refused


class PrefillServer:
    """Takes prompts at an address. Its methods may be called from any thread.

    Args:
        thread: of an engine that is warm. Others may use it too.
        weights: `fingerprint` of its model's parameters.
        host, port: to listen at; port 0: any that is free.
        direct: whether pages may go by `jax.experimental.transfer`.
        unsent: bytes of pages that may wait to be sent before new requests wait.

    Raises ValueError for an address that cannot be had.
    """

    def __init__(
        self,
        thread: EngineThread,
        weights: str,
        host: str,
        port: int,
        *,
        deadlines: Deadlines = Deadlines(),  # noqa: B008
        direct: bool = True,
        unsent: int = _UNSENT,
    ):
        self._thread, self._side = thread, Side(thread, weights, deadlines, direct)
        self._jobs, self._most_unsent = set[Job](), unsent
        self._draining, self._count = False, itertools.count()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=128)
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"cannot listen at {host}:{port} for decode servers: {error}; choose another port"
            ) from error
        self._listener.setblocking(False)
        self._workers = concurrent.futures.ThreadPoolExecutor(4, "pages to the host")
        self._loop = LoopThread("prefill server")
        self._loop.call(lambda: self._loop.start(self._accept()))

    @property
    def address(self) -> tuple[str, int]:
        return self._listener.getsockname()[:2]  # type: ignore[no-any-return]

    @property
    def requests(self) -> int:
        """Those that are not ended."""
        return max(0, len(self._loop) - 1)

    def drain(self) -> None:
        """Refuses what comes from now on."""
        self._draining = True

    def close(self) -> None:
        """Ends all requests."""
        self._loop.close()
        self._listener.close()
        self._workers.shutdown(wait=False, cancel_futures=True)

    # --- a connection ---

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # too many files are open, say: others will end
                LOGGER.warning("no connection", extra={"fields": {"error": str(error)}})
                await asyncio.sleep(0.1)
                continue
            if self.requests >= 2 * _CONNECTIONS:  # too many to tell them that there are too many
                connection.close()
                continue
            self._loop.start(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        """A request, whatever becomes of it."""
        began = time.monotonic()
        failed: TransferError | None = None
        fields: dict[str, Any] = {"state": "meeting"}
        channel = Channel(connection, self._side.deadlines)
        try:
            fields |= {"from": "{}:{}".format(*connection.getpeername()[:2])}
            async with channel.beating(self._side.deadlines.beat):
                await self._answer(channel, connection, fields)
        except (WireError, TimeoutError, OSError) as error:
            failed = PrefillLostError(str(error) or "it took too long")
        except TransferError as error:
            failed = error
            await _told(channel, error)
        except Exception as error:
            LOGGER.exception("a prefill failed", extra={"fields": fields})
            failed = PrefillRefusedError(f"{type(error).__name__}: {error}")
            await _told(channel, failed)
        except asyncio.CancelledError:
            failed = PrefillRefusedError("the server ended")
            await _told(channel, failed)
            raise
        finally:
            channel.close()
            self._side.ended("prefill", fields, began, None if failed is None else failed.code, failed)

    async def _answer(self, channel: Channel, connection: socket.socket, fields: dict[str, Any]) -> None:
        async with asyncio.timeout(self._side.deadlines.meet):
            job, request = await self._meet(channel, connection, fields)
        hearing = asyncio.ensure_future(self._hear(channel, job))
        sending = asyncio.ensure_future(self._send(channel, job, request, fields))
        try:
            await asyncio.wait((hearing, sending), return_when=asyncio.FIRST_COMPLETED)
            (sending if sending.done() else hearing).result()
            fields["state"] = "ended"
            await asyncio.wait((hearing,), timeout=self._side.deadlines.silence)  # the other side ends it
        finally:
            self._jobs.discard(job)
            hearing.cancel()
            sending.cancel()
            self._thread.abort(request.id)
            await asyncio.gather(hearing, sending, return_exceptions=True)

    async def _meet(
        self, channel: Channel, connection: socket.socket, fields: dict[str, Any]
    ) -> tuple[Job, Request]:
        """What is asked, when the servers know each other."""
        asked = await channel.receive({wire.ASK: _ASK})
        longest = self._thread.engine.device.sizes.max_model_len
        if asked.size > 4 * longest:
            await channel.skip(asked.size)  # what is unread when a connection ends takes the answer with it
            raise PrefillRefusedError(f"{asked.size // 4} tokens, and its sequences have {longest} at most")
        tokens = np.frombuffer(await channel.read(asked.size), "<i4", asked.size // 4).tolist()
        says, identity = asked.says, self._side.identity
        fields |= {"id": field(says, "id", text(_NAME)), "tokens": len(tokens)}
        self._side.check(field(says, "identity", lambda value: isinstance(value, dict)))
        if self._draining:
            raise PrefillRefusedError("it takes no more requests: it is about to end")
        if self.requests > _CONNECTIONS:
            raise PrefillRefusedError(f"it has {_CONNECTIONS} requests, and takes no more")
        end = field(says, "end", count(1, len(tokens) - 1))
        first = field(says, "first", count(0, (end - 1) // PAGE))
        job = Job(self._loop, tokens, first, end, field(says, "moved", count(1, 1 << 16)), identity.version)
        request = Request(
            f"prefill-{next(self._count)}",
            tokens,
            1,
            salt=field(says, "salt", text(_NAME)),
            priority=field(says, "priority", count(-_RANGE, _RANGE)),
            prompt_logprobs=field(says, "prompt_logprobs", lambda n: n is None or count(0, TOP)(n)),
            export=job,
        )
        can = field(says, "direct", lambda value: isinstance(value, bool)) and job.moved == self._side.moved
        if can and self._side.directs is not None:
            job.direct = self._side.directs.at(connection.getsockname()[0])
        port = None if job.direct is None else job.direct.port
        await channel.send(wire.TAKEN, {"identity": dataclasses.asdict(identity), "direct": port})
        fields |= {"state": "queued", "first_page": first}
        return job, request

    async def _hear(self, channel: Channel, job: Job) -> None:
        """Until the other side ends."""
        while True:
            message = await channel.receive({wire.GOT: 0, wire.END: 0})
            if message.kind == wire.END:
                raise NotWantedError("the decode server ended it")
            if not job.offered:
                raise WireError("it sent what it must not: it was offered nothing")
            job.offered = False
            job.heard.put_nowait(field(message.says, "good", lambda value: isinstance(value, bool)))

    async def _send(self, channel: Channel, job: Job, request: Request, fields: dict[str, Any]) -> None:
        while sum(job.unsent for job in self._jobs) > self._most_unsent:
            await asyncio.sleep(0.01)
        self._jobs.add(job)
        self._thread.submit(request, job.update, job.refused)
        sending = Sending(self._side, channel, job, self._workers)
        while not isinstance(event := await job.events.get(), Update | Exception):
            fields["state"] = "sending"
            first, n, block = event
            self._check_version(job)  # as pages come, they are kept there for other prompts
            await sending.pages(first, n, block)
            job.unsent -= block.nbytes
        if isinstance(event, Exception):
            raise PrefillRefusedError(str(event))
        if event.finish_reason != "length":
            raise PrefillRefusedError(event.error or f"the engine ended the request: {event.finish_reason}")
        self._check_version(job)
        given = packed((event.prompt or ())[: job.end + 1], request.prompt_logprobs)
        await channel.send(wire.DONE, {"cached": event.cached_tokens}, given)

    def _check_version(self, job: Job) -> None:
        if self._thread.engine.version != job.version:
            raise PrefillDiffersError("the weights were changed while the prompt was computed")


async def _told(channel: Channel, error: TransferError) -> None:
    """The other side, if it is there."""
    with contextlib.suppress(WireError, OSError, TimeoutError):
        async with asyncio.timeout(_TOLD):
            await channel.send(wire.FAILED, {"code": error.code, "message": str(error)[:1000]})

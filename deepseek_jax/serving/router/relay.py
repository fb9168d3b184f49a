"""One request on its way through the router: to a pair of servers, and to another pair if one of them is lost."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import NamedTuple

import httpx

from deepseek_jax.serving.router.choice import Sent
from deepseek_jax.serving.router.client import Client
from deepseek_jax.serving.router.members import Members
from deepseek_jax.serving.router.told import DiffersError, Told
from deepseek_jax.serving.router.wants import Wants
from deepseek_jax.serving.server import leftover
from deepseek_jax.serving.server.answer import DONE, event
from deepseek_jax.serving.server.errors import ApiError, said, said_in_stream
from deepseek_jax.serving.server.metrics import Counter
from deepseek_jax.serving.server.wire import Json

_NOT_OURS = frozenset(("connection", "content-length", "date", "server", "transfer-encoding", "x-request-id"))
_END = b"\n\n"


class Rules(NamedTuple):
    """tries: how often a request is sent, at most. patience: seconds that it waits for a server that takes it. keep_alive:
    seconds of silence after which a stream gets a comment."""

    tries: int = 3
    patience: float = 30.0
    keep_alive: float = 10.0


class Counts(NamedTuple):
    """Of each server: requests that were sent there, and how many of them for another time."""

    sent: Counter
    retries: Counter


class AgainError(Exception):
    """What was asked did not come, and may come from others. error: what the client is told if nobody else is there. without:
    who is not asked again."""

    def __init__(self, error: ApiError, without: str | None = None):
        super().__init__(str(error))
        self.error, self.without = error, without


class Relay:
    """Sends one request on, and what comes of it back to the client."""

    def __init__(
        self, members: Members, http: httpx.AsyncClient, rules: Rules, counts: Counts, figures: Json
    ):
        self._members, self._http, self._rules = members, http, rules
        self._counts, self._figures = counts, figures
        self._told = Told()

    async def answer(self, wants: Wants, client: Client) -> None:
        """Raises ApiError, in the middle of an answer as well."""
        again, full, failed_there = None, set[str](), set[str]()
        for i in range(self._rules.tries):
            seconds = 0 if again is not None and again.error.status == 429 else self._rules.patience
            sent = await self._members.pair(wants.ask, full, seconds, failed_there)
            if sent is None:
                break
            for server in filter(None, (sent.prefill, sent.decode)):
                self._counts.sent.add(1, server)
            if again is not None:
                self._counts.retries.add(1, sent.decode)
            self._figures |= {"prefill": sent.prefill, "decode": sent.decode, "tries": i + 1}
            try:
                await _Try(self._members, self._http, self._told, wants, client, sent).run()
                return
            except AgainError as failed:
                again = failed
                if failed.without is not None:
                    (full if failed.error.status == 429 else failed_there).add(failed.without)
        raise (
            ApiError(503, "no server is there that takes the request", retry_after=2.0)
            if again is None
            else again.error
        )


class _Try:
    """A request, sent to one pair."""

    def __init__(
        self, members: Members, http: httpx.AsyncClient, told: Told, wants: Wants, client: Client, sent: Sent
    ):
        self._members, self._http, self._told = members, http, told
        self._wants, self._client, self._sent = wants, client, sent
        self._prefill = sent.prefill  # for who has to be named when it is done

    async def run(self) -> None:
        """Raises AgainError, ApiError."""
        try:
            async with asyncio.timeout(None) as limit:
                with self._members.asking(self._sent.decode, limit):
                    await self._ask()
        except httpx.LocalProtocolError as error:
            raise ApiError(400, f"the request cannot be sent on: {error}") from error
        except httpx.TransportError as error:
            raise self._lost(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        except TimeoutError as error:
            raise self._lost("nothing is heard of it") from error
        finally:
            self._members.choice.ended(self._sent)

    async def _ask(self) -> None:
        wants, headers = self._wants, dict(self._wants.headers)
        if wants.answer and self._prefill is not None:
            headers |= {name.encode(): x.encode() for name, x in self._members.naming(self._prefill).items()}
        request = self._http.build_request(
            wants.method, f"http://{self._sent.decode}{wants.path}", headers=headers, content=wants.body
        )
        response = await self._http.send(request, stream=True)
        ignored = response.headers.get(leftover.HEADER)
        if ignored is not None:
            self._client.headers = ((leftover.HEADER.encode(), ignored.encode()),)
        try:
            if response.status_code == 200 and _kind(response).startswith("text/event-stream"):
                await self._stream(response)
            else:
                await self._whole(response)
        finally:
            await response.aclose()

    # --- whole answers ---

    async def _whole(self, response: httpx.Response) -> None:
        body = await response.aread()
        if response.status_code >= 400:
            self._judge(said(response.status_code, response.headers, body))
        if self._client.started:  # by a comment, as a stream: what comes instead is an error
            raise said(response.status_code, response.headers, body)
        headers = [(k.lower(), v) for k, v in response.headers.raw if k.lower().decode() not in _NOT_OURS]
        await self._client.whole(response.status_code, headers, body)

    def _judge(self, error: ApiError) -> None:
        """Raises AgainError for an error that others may not have."""
        code = str(error.code)
        if code.startswith("prefill_"):
            if code == "prefill_lost" and self._prefill is not None:
                self._members.broken(self._prefill, str(error))
            raise AgainError(error, self._prefill)
        if error.status == 429:
            raise AgainError(error, self._sent.decode)
        if error.status in (502, 503, 504):
            self._members.broken(self._sent.decode, str(error))
            raise AgainError(error)

    def _lost(self, why: str) -> AgainError:
        self._members.broken(self._sent.decode, why)
        return AgainError(
            ApiError(503, "the server was lost before the answer was complete", retry_after=1.0)
        )

    # --- streams ---

    async def _stream(self, response: httpx.Response) -> None:
        self._told.begin()
        async for events in _events(response):
            if await self._go_on(events):
                await self._client.done()
                return
        raise self._lost("its stream ended in the middle")

    async def _go_on(self, events: list[bytes]) -> bool:
        """Passes them on, those before an error, too; whether the stream is complete. Raises AgainError, ApiError."""
        parts: list[bytes] = []
        try:
            for raw in events:
                if raw == DONE:
                    return True
                parts.append(self._passed(raw))
            return False
        finally:
            if out := b"".join(parts):
                await self._client.events(out)

    def _passed(self, raw: bytes) -> bytes:
        """What of an event goes to the client. Raises AgainError, ApiError for the event of an error."""
        if not raw.startswith(b"data:"):
            return b""  # a comment; the router sends its own
        value: Json = json.loads(raw[5:])
        if "error" in value:
            error = said_in_stream(raw[5:])
            self._judge(error)
            raise error
        self._sent = self._members.choice.prefilled(self._sent)
        try:
            new = self._told.new(value)
        except DiffersError as error:
            raise ApiError(
                500,
                f"the server was lost, and another one's answer is not the same: {error}",
                None,
                "answer_differs",
            ) from error
        return b"" if new is None else raw if new is value else event(new)


def _kind(response: httpx.Response) -> str:
    return str(response.headers.get("content-type", ""))


async def _events(response: httpx.Response) -> AsyncIterator[list[bytes]]:
    """The whole events that each piece of a stream completes."""
    rest = b""
    async for piece in response.aiter_raw():
        rest += piece
        *events, rest = rest.split(_END)
        if events:
            yield [raw + _END for raw in events]

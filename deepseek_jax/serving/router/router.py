"""The router's life and what its requests share: the servers, who asks them how they are, and counts."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import httpx

from deepseek_jax.checks import require, shown
from deepseek_jax.json_files import parse_object
from deepseek_jax.serving.router.client import Client
from deepseek_jax.serving.router.members import LOGGER, Members, PerServer, read_member
from deepseek_jax.serving.router.relay import Counts, Relay, Rules
from deepseek_jax.serving.router.wants import Wants
from deepseek_jax.serving.server.errors import ApiError
from deepseek_jax.serving.server.metrics import Counter, Histogram, Metric, Read
from deepseek_jax.serving.server.metrics import text as metrics_text
from deepseek_jax.serving.server.wire import Json

_CONNECT = 3.0  # seconds that a server may take to accept a connection
_MEMORY = 1 << 30  # bytes of requests at the same time


@dataclasses.dataclass(frozen=True)
class Settings:
    """Attributes:
    servers: addresses that are asked how they are; others say so themselves.
    api_key: that clients must send; it goes on to the servers. None: the router asks for none.
    fleet_key: that servers must send which say that they are there; None: only those of this machine may.
    max_body: bytes of a request.
    requests: at the same time.
    deadline: seconds in which a request is answered.
    beat, silence: seconds from one question how a server is to the next, and after which it is lost.
    rules: of each request.
    """

    servers: tuple[str, ...] = ()
    api_key: str | None = None
    fleet_key: str | None = None
    max_body: int = 16 << 20
    requests: int = 4096
    deadline: float = 3600.0
    beat: float = 1.0
    silence: float = 10.0
    rules: Rules = Rules()  # noqa: RUF009

    def __post_init__(self) -> None:
        for name in ("max_body", "requests", "deadline", "beat"):
            require(getattr(self, name) > 0, f"{name}={shown(getattr(self, name))} must be positive")
        require(
            self.silence >= 2 * self.beat,
            f"silence={shown(self.silence)} must be at least two beats of {self.beat:g} s",
        )
        for name in ("api_key", "fleet_key"):
            require(getattr(self, name) != "", f"{name} is empty: leave it out")


class Router:
    """Its state is "starting", "ready", "draining"; `server/running.py: Life`."""

    def __init__(self, settings: Settings):
        self.settings, self.state, self.requests = settings, "starting", 0
        self.members = Members(settings.silence, settings.fleet_key)
        self._bytes = 0
        self._limits: set[asyncio.Timeout] = set()  # of requests
        self._tasks: list[asyncio.Task[None]] = []
        # no connection is kept: a server may close it as the next request is sent
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(None, connect=_CONNECT)
        self._http = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
        self._answered = Counter("deepseek_jax:router_requests_total", "Requests that ended.", ("status",))
        self._counts = Counts(
            Counter("deepseek_jax:router_sent_total", "Requests that were sent to a server.", ("server",)),
            Counter("deepseek_jax:router_retries_total", "That were sent for another time.", ("server",)),
        )
        self._seconds = Histogram(
            "deepseek_jax:router_request_seconds", "From a request to the end of its answer."
        )
        self._metrics: tuple[Metric, ...] = (
            *(self._answered, *self._counts, self.members.lost_total, self._seconds),
            Read("deepseek_jax:router_requests", "That are being answered.", lambda: self.requests),
            Read("deepseek_jax:router_request_bytes", "Of those.", lambda: self._bytes),
            PerServer(
                "deepseek_jax:router_server_alive", "1: requests are sent there.", self.members, "alive"
            ),
            PerServer("deepseek_jax:router_server_requests", "That it is asked now.", self.members, "asked"),
        )

    # --- its life ---

    def begin(self, _: Any = None) -> None:
        self.state = "ready" if self.state == "starting" else self.state
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._watch()))
        self._tasks += [loop.create_task(self._ask_again(address)) for address in self.settings.servers]

    def drain(self) -> None:
        self.state = "draining"

    async def drained(self, seconds: float) -> bool:
        """Waits for the end of all requests; those that are not in time end with an error. Returns whether all were in time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.requests and loop.time() < end:
            await asyncio.sleep(0.02)
        late = bool(self.requests)
        for limit in list(self._limits):
            if not limit.expired():
                limit.reschedule(0)
        for task in self._tasks:
            task.cancel()
        return not late

    def close(self) -> None: ...

    @property
    def ready(self) -> bool:
        """Whether it has somebody to send requests to."""
        return self.state == "ready" and self.members.answers

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.settings.beat)
            self.members.lose_silent()

    async def _ask_again(self, address: str) -> None:
        """Asks a server how it is, again and again."""
        wrong = ""
        while True:
            before, wrong = wrong, await self._failure(address)
            if wrong and wrong != before:
                LOGGER.warning(
                    "server", extra={"fields": {"server": address, "state": "no answer", "why": wrong}}
                )
            await asyncio.sleep(self.settings.beat)

    async def _failure(self, address: str) -> str:
        """Asks once; what went wrong, "" if nothing."""
        try:
            answer = await self._http.get(f"http://{address}/member", timeout=self.settings.silence / 2)
            answer.raise_for_status()
            said = read_member(parse_object(answer.content, "its answer"), address.rpartition(":")[0])
            self.members.heard(said._replace(address=address))
        except Exception as error:  # whatever it is, the next time may be better
            return f"{type(error).__name__}: {error}"
        return ""

    # --- requests ---

    def check_open(self) -> None:
        """Raises ApiError where no new request is taken."""
        if self.state == "draining":
            raise ApiError(503, "the router is stopping and takes no new requests", retry_after=5.0)
        if self.requests > self.settings.requests or self._bytes > _MEMORY:
            raise ApiError(429, f"the router has {self.requests} requests; try again later", retry_after=1.0)

    async def answer(self, wants: Wants, client: Client, figures: Json) -> None:
        """Raises ApiError if nothing has been sent to the client."""
        loop = asyncio.get_running_loop()
        began, self._bytes = loop.time(), self._bytes + len(wants.body)
        keeps = loop.create_task(client.keep_alive(self.settings.rules.keep_alive)) if wants.stream else None
        try:
            await self._in_time(wants, client, figures)
        except ApiError as error:
            await client.fail(error)
        finally:
            if keeps is not None:
                keeps.cancel()
            self._bytes -= len(wants.body)
            self._seconds.observe(loop.time() - began)

    async def _in_time(self, wants: Wants, client: Client, figures: Json) -> None:
        """Raises ApiError."""
        relay = Relay(self.members, self._http, self.settings.rules, self._counts, figures)
        try:
            async with asyncio.timeout(self.settings.deadline) as limit:
                with _added(self._limits, limit):
                    await relay.answer(wants, client)
        except TimeoutError as error:
            if self.state == "draining":
                raise ApiError(503, "the router stopped before the answer was complete") from error
            raise ApiError(504, f"no answer within {self.settings.deadline:g} s") from error

    def text(self) -> str:
        return metrics_text((), self._metrics)

    def ended(self, status: int) -> None:
        self._answered.add(1, str(status))


@contextlib.contextmanager
def _added(limits: set[asyncio.Timeout], limit: asyncio.Timeout) -> Iterator[None]:
    limits.add(limit)
    try:
        yield
    finally:
        limits.discard(limit)

"""The servers that a router knows: what they say of themselves, when they were heard, and who must know when one is lost."""

import asyncio
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from deepseek_jax.checks import choice as one_of
from deepseek_jax.checks import is_integer, require, shown
from deepseek_jax.serving.router.choice import ROLES, Ask, Choice, Load, Sent
from deepseek_jax.serving.server.body import PREFILL, SIGNATURE, signature
from deepseek_jax.serving.server.metrics import Counter, Labels, Metric
from deepseek_jax.serving.server.wire import Json

LOGGER = logging.getLogger("deepseek_jax.serving.router")
_MOST = 4096  # servers
_FORGET = 600.0  # seconds of silence after which a server is not listed any more


class Member(NamedTuple):
    """What a server says of itself.

    address: "host:port" of HTTP. transfer: of a prefill server, where decode servers fetch prompts. identity: of the process,
    new at each start. ready: it takes requests. alone: it can do without a prefill server.
    """

    address: str
    role: str
    model: str
    identity: str
    transfer: str | None
    ready: bool
    alone: bool
    load: Load


def read_member(value: Mapping[str, Any], host: str) -> Member:
    """host: where the server is, as far as it does not say so itself (":8001"). Raises ValueError."""
    for name in ("address", "role", "model", "identity"):
        require(isinstance(value.get(name), str), f"{name}={shown(value.get(name))} must be a string")
    role, transfer = value["role"], value.get("transfer")
    one_of("role", role, ROLES)
    ready = value.get("ready") is True
    require(
        isinstance(transfer, str) if ready and role == "prefill" else isinstance(transfer, str | None),
        f"transfer={shown(transfer)} must be the address where a prefill server gives prompts",
    )
    return Member(
        address=_address("address", value["address"], host),
        role=role,
        model=value["model"],
        identity=value["identity"],
        transfer=None if transfer is None else _address("transfer", transfer, host),
        ready=ready,
        alone=value.get("alone") is True,
        load=_load(value.get("load")),
    )


def _load(value: Any) -> Load:
    require(isinstance(value, Mapping), f"load={shown(value)} must be an object")
    known = {name: value.get(name, 0) for name in Load._fields}
    for name, x in known.items():
        require(is_integer(x) and x >= 0, f"load.{name}={shown(x)} must be an integer >= 0")
    return Load(**known)


def _address(name: str, value: str, host: str) -> str:
    """ "host:port" of what may be ":port"."""
    before, _, port = value.rpartition(":")
    good = port.isascii() and port.isdigit() and 0 < int(port) < 65536 and not set(before) & set("/@?# \r\n")
    require(good, f"{name}={shown(value)} must be host:port")
    return f"{before or host}:{port}"


class Members:
    """Keeps a `Choice` up to date.

    Args:
        silence: seconds after which a server that is not heard is lost.
        key: with which headers are signed; None: they are not.
    """

    def __init__(self, silence: float, key: str | None = None):
        self.choice, self._key = Choice(silence), key
        self.known: dict[str, Member] = {}
        self._when: dict[str, float] = {}  # seconds, each was heard last
        self.lost_total = Counter(
            "deepseek_jax:router_lost_total", "Times that a server was lost.", ("server",)
        )
        self._asks: dict[str, set[asyncio.Timeout]] = {}  # what is asked of a server now
        self._changed = asyncio.Event()

    # --- what is heard ---

    def heard(self, member: Member) -> None:
        """Raises ValueError for a server of another model than those that are there."""
        name, before = member.address, self.known.get(member.address)
        others = {m.model for m in self.known.values() if m.address != name and self._alive(m.address)}
        require(
            not others or member.model in others,
            f"model={shown(member.model)} is not that of the other servers, {sorted(others)}: a router serves one model",
        )
        require(before is not None or len(self.known) < _MOST, f"there are {_MOST} servers already")
        if before is not None and before.identity != member.identity:
            self.lost(name, "it was started again")
        self.known[name], self._when[name] = member, time.monotonic()
        if not member.ready:
            self.choice.lost(name)  # what it has, it may still finish
            return
        if not self._alive(name):
            LOGGER.info("server", extra={"fields": {"server": name, "role": member.role, "state": "there"}})
        self.choice.heard(name, member.role, member.load, time.monotonic(), member.alone)
        self._changed.set()

    def broken(self, name: str, why: str) -> None:
        """A server did not do what it was asked: nothing more is sent there until it is heard again. What else it was asked
        shows for itself."""
        if self._alive(name):
            self.lost_total.add(1, name)
            LOGGER.warning("server", extra={"fields": {"server": name, "state": "lost", "why": why}})
        self.choice.lost(name)

    def lost(self, name: str, why: str) -> None:
        """A server is gone: what is asked of it now ends with a TimeoutError."""
        self.broken(name, why)
        for limit in self._asks.get(name, ()):
            if not limit.expired():
                limit.reschedule(0)

    def lose_silent(self) -> None:
        for name, server in list(self.choice.servers.items()):
            if server.alive and time.monotonic() - server.when > self.choice.silence:
                self.lost(name, f"nothing was heard of it for {self.choice.silence:g} s")
        for name in [name for name, when in self._when.items() if time.monotonic() - when > _FORGET]:
            self.choice.forget(name)
            del self.known[name], self._when[name]

    def _alive(self, name: str) -> bool:
        server = self.choice.servers.get(name)
        return server is not None and server.alive

    # --- requests ---

    async def pair(
        self, ask: Ask, without: Collection[str], seconds: float, last: Collection[str] = ()
    ) -> Sent | None:
        """Waits for somebody who takes a request. last: who is asked only where there is nobody else."""
        end = time.monotonic() + seconds
        while (sent := self.choice.send(ask, {*without, *last}) or self.choice.send(ask, without)) is None:
            self._changed.clear()
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                return None
        return sent

    def naming(self, prefill: str) -> dict[str, str]:
        """Headers that tell a decode server who computes the prompt."""
        address = self.known[prefill].transfer or ""
        signed = {} if self._key is None else {SIGNATURE: signature(self._key, address)}
        return {PREFILL: address} | signed

    @contextmanager
    def asking(self, name: str, limit: asyncio.Timeout) -> Iterator[None]:
        """A server is asked something within the limit, which ends when the server is lost."""
        asks = self._asks.setdefault(name, set())
        asks.add(limit)
        try:
            yield
        finally:
            asks.discard(limit)

    @property
    def answers(self) -> bool:
        """Whether anybody takes a request now."""
        return self.choice.pair(Ask()) is not None

    # --- for people ---

    def listed(self) -> list[Json]:
        now = time.monotonic()
        return [
            {
                **member._asdict(),
                "load": member.load._asdict(),
                "alive": self._alive(name),
                "silent_s": round(now - self._when[name], 1),
                "asked": len(self._asks.get(name, ())),
            }
            for name, member in sorted(self.known.items())
        ]


class PerServer(Metric):
    """A gauge of each server."""

    kind = "gauge"

    def __init__(self, name: str, help: str, members: Members, field: str):
        super().__init__(name, help)
        self._members, self._field = members, field

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        for server in self._members.listed():
            yield "", (("server", server["address"]), ("role", server["role"])), server[self._field]

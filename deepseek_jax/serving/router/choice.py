"""Which prefill server computes a prompt, and which decode server answers: by load, and by what each has computed before.

The choice knows no clock, socket or thread: time is an argument, and the same calls give the same answers. So the router and
a simulator of a cluster drive the same object.

choice = Choice(silence=10.0)
choice.heard("a:1", "prefill", Load(), now=0.0)
choice.heard("b:1", "decode", Load(tokens=64_000, rows=32), now=0.0)
sent = choice.send(Ask(keys, tokens=1000))   # sent.prefill == "a:1", sent.decode == "b:1"
choice.prefilled(sent)                       # the first token is there
choice.ended(sent)                           # the last one, or there will be none
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable, Sequence
from typing import NamedTuple

from deepseek_jax.checks import choice as one_of
from deepseek_jax.checks import require, shown

ROLES = ("prefill", "decode", "both")  # "both": answers by itself, as a decode server without prefill
BLOCK = 64  # tokens of a block of a prompt, about, where it is text
_BLOCKS = 1 << 16  # that are remembered of a server, at most


class Load(NamedTuple):
    """What a server says of itself.

    requests: that run or wait. queued: tokens of prompts that are not computed. held: tokens in its cache. tokens: that its
    cache has room for; 0: not known. rows: requests that run at the same time; 0: not known.
    """

    requests: int = 0
    queued: int = 0
    held: int = 0
    tokens: int = 0
    rows: int = 0


NOTHING = Load()


class Ask(NamedTuple):
    """What a choice knows of a request. keys: one for each whole block that its prompt begins with, each a name for all tokens
    up to there. tokens: of the prompt. block: tokens of a block."""

    keys: Sequence[Hashable] = ()
    tokens: int = 0
    block: int = BLOCK


class Sent(NamedTuple):
    """A request on its way. prefill: None: decode computes the prompt itself. uncached, held: tokens that are computed, and that
    decode has to store. prefill_life, decode_life: of the servers (`Server.life`)."""

    prefill: str | None
    decode: str
    uncached: int
    held: int
    prefill_life: int
    decode_life: int


@dataclasses.dataclass
class Server:
    """What is known of a server.

    alive: it answered when it was last heard of. alone: it can answer without prefill. when: seconds, that was. life: how often it was lost. load: as it said when
    it was last heard; requests, queued, held: what was sent there and came back since.
    """

    name: str
    role: str
    load: Load = NOTHING
    alive: bool = True
    alone: bool = True
    when: float = 0.0
    life: int = 0
    requests: int = 0
    queued: int = 0
    held: int = 0

    def __post_init__(self) -> None:
        self._blocks: OrderedDict[Hashable, None] = OrderedDict()  # the one used last is last

    def heard(self, load: Load | None, now: float, alone: bool) -> None:
        self.alive, self.when, self.alone = True, now, alone
        if load is not None:
            self.load = load
            self.requests = self.queued = self.held = 0

    def lose(self) -> None:
        """It is gone, and all that it had computed."""
        self.alive, self.load, self.life = False, NOTHING, self.life + 1
        self.requests = self.queued = self.held = 0
        self._blocks.clear()

    def hits(self, ask: Ask) -> int:
        """Tokens of a prompt that it has probably computed before; one at least is left to compute."""
        blocks = next((i for i, key in enumerate(ask.keys) if key not in self._blocks), len(ask.keys))
        return min(blocks * ask.block, max(0, ask.tokens - 1))

    def remember(self, ask: Ask) -> None:
        for key in reversed(ask.keys):  # the end of a prompt is forgotten before its beginning
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        most = min(_BLOCKS, self.load.tokens // ask.block or _BLOCKS)
        while len(self._blocks) > most:
            self._blocks.popitem(last=False)

    def waits(self, ask: Ask) -> float:
        """Tokens that are computed here until the prompt is."""
        return max(0, self.load.queued + self.queued) + ask.tokens - self.hits(ask)

    def fullness(self, ask: Ask) -> float:
        """Share of its cache and of its rows that are taken with the request, added; above 2 it waits."""
        held = max(0, self.load.held + self.held) + ask.tokens - self.hits(ask)
        return held / (self.load.tokens or _BLOCKS * BLOCK) + (self.busy + 1) / (self.load.rows or 256)

    @property
    def busy(self) -> int:
        return max(0, self.load.requests + self.requests)


class Choice:
    """Pairs for requests.

    Args:
        silence: seconds after which a server that says nothing is lost.

    Attributes:
        servers: by name, the address.
    """

    def __init__(self, silence: float = 10.0):
        require(silence > 0, f"silence={shown(silence)} must be positive")
        self.silence = silence
        self.servers: dict[str, Server] = {}

    # --- who is there ---

    def heard(self, name: str, role: str, load: Load | None, now: float, alone: bool = True) -> None:
        """A server is there and takes requests. load: None: it says nothing of it. alone: a decode server computes a prompt
        itself where no prefill server can."""
        one_of("role", role, ROLES)
        known = self.servers.get(name)
        if known is None or known.role != role:
            life = 0 if known is None else known.life + 1
            known = self.servers[name] = Server(name, role, life=life)
        known.heard(load, now, alone)

    def lost(self, name: str) -> None:
        """Nothing is sent to a server until it is heard again, and what it had computed is forgotten."""
        server = self.servers.get(name)
        if server is not None and server.alive:
            server.lose()

    def forget(self, name: str) -> None:
        """A server will not come back."""
        self.servers.pop(name, None)

    def silent(self, now: float) -> list[str]:
        """Loses those that were not heard for too long; their names."""
        names = [s.name for s in self.servers.values() if s.alive and now - s.when > self.silence]
        for name in names:
            self.lost(name)
        return names

    # --- requests ---

    def send(self, ask: Ask, without: Container[str] = ()) -> Sent | None:
        """The pair for a request, which counts as sent there from now on; None: nobody is there to answer.

        Prefill: where the fewest tokens are computed until the prompt is. Decode: where the smallest share of cache and rows is
        taken. Of equals, the one with fewer requests, then the first by name. A server for "both" answers by itself; so does a
        decode server that can, where no prefill server is there.

        without: servers that are not asked again.
        """
        pair = self.pair(ask, without)
        return None if pair is None else self._sent(ask, *pair)

    def pair(self, ask: Ask, without: Container[str] = ()) -> tuple[Server | None, Server] | None:
        """As `send`, which sends nothing: who computes, and who answers."""
        here = [s for s in self.servers.values() if s.alive and s.name not in without]
        computes = _least((s.waits(ask), s.busy, s.name, s) for s in here if s.role == "prefill")
        answers = _least(
            (s.fullness(ask), s.busy, s.name, s)
            for s in here
            if s.role == "both" or (s.role == "decode" and (s.alone or computes is not None))
        )
        if answers is None:
            return None
        return (computes if answers.role == "decode" else None), answers

    def _sent(self, ask: Ask, computes: Server | None, answers: Server) -> Sent:
        uncached = ask.tokens - (computes or answers).hits(ask)
        sent = Sent(
            prefill=None if computes is None else computes.name,
            decode=answers.name,
            uncached=uncached,
            held=ask.tokens - answers.hits(ask),
            prefill_life=0 if computes is None else computes.life,
            decode_life=answers.life,
        )
        self._count(sent, computes, 1)
        answers.requests, answers.held = answers.requests + 1, answers.held + sent.held
        for server in filter(None, (computes, answers)):
            server.remember(ask)
        return sent

    def prefilled(self, sent: Sent) -> Sent:
        """The prompt is computed. Returns what `ended` is to be told."""
        self._count(sent, self._same(sent.prefill, sent.prefill_life), -1)
        return sent._replace(prefill=None)

    def ended(self, sent: Sent) -> None:
        """Nothing more comes of a request."""
        self.prefilled(sent)
        answers = self._same(sent.decode, sent.decode_life)
        if answers is not None:
            answers.requests, answers.held = answers.requests - 1, answers.held - sent.held

    def _count(self, sent: Sent, computes: Server | None, sign: int) -> None:
        if computes is not None and sent.prefill is not None:
            computes.queued += sign * sent.uncached
            computes.requests += sign

    def _same(self, name: str | None, life: int) -> Server | None:
        """A server, if it was not lost since."""
        server = self.servers.get(name) if name is not None else None
        return server if server is not None and server.life == life else None


def _least(ranked: Iterable[tuple[float, int, str, Server]]) -> Server | None:
    best = min(ranked, default=None)
    return None if best is None else best[-1]

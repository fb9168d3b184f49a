"""What the scheduler hands to the engine: sequences, and the steps in which they are computed."""

import dataclasses
from collections import deque
from typing import NamedTuple, Protocol

from deepseek_jax.checks import ranges
from deepseek_jax.serving.request import Request


@dataclasses.dataclass(frozen=True)
class Limits:
    """What may run.

    Attributes:
        rows: sequences at once; each has a slot in 0 .. rows - 1.
        budget: tokens of one step at most; a decode row counts 1 + drafts. All rows fit, and a token of a prompt.
        chunk: tokens of one chunk of a prompt at most.
        max_model_len: tokens of a sequence at most, prompt and answer.
        waiting: requests that may wait beyond those that find a slot.
        drafts: tokens that a decode row may compute beyond its last one.
        reserve: pages for prompt and max_tokens are taken at admission, so that nothing is ever preempted.
        whole_pages: chunks are the pages of 64 tokens, each alone, the last of a prompt as long as it is; what decode rows
            computed is not found by other prompts. Who shares a step changes no chunk then.
    """

    rows: int
    budget: int
    chunk: int
    max_model_len: int
    waiting: int
    drafts: int = 0
    reserve: bool = False
    whole_pages: bool = False

    def __post_init__(self):
        ranges("limits", self, "rows budget chunk max_model_len", 1, 2**31)
        ranges("limits", self, "waiting drafts", 0, 2**31)

    @property
    def row_tokens(self) -> int:
        return 1 + self.drafts


class Fetch(Protocol):
    """The pages of a sequence, on their way from another server."""

    def cancel(self) -> None:
        """They are not wanted any more. Is called between two turns, or in one, and waits for nothing."""
        ...


@dataclasses.dataclass(eq=False, slots=True)
class Running:
    """A sequence, from its arrival to its end, whether it has a slot or waits for one.

    Attributes:
        request: what was asked.
        arrival: requests of equal priority run in this order.
        tokens: prompt and answer, as far as the host knows it.
        limit: tokens at most, prompt and answer.
        slot: -1 while it waits.
        epoch: goes up when it loses its slot: results of earlier epochs are stale.
        pages: what it holds, in order.
        goal: tokens that chunks compute, all that were known at admission; decode rows come behind.
        until: those of them that chunks may compute now. fetch: what brings others from another server, if that is so.
        computed: tokens whose latents are in its pages, or will be after the launched steps; with drafts, at least so many.
        unsure: further ones that will be if all drafts in flight are accepted.
        launched: of each launch in flight that draws: by how much it raised `computed`, `unsure` and `pending`.
        pending: tokens drawn by launched steps that the host does not know yet; with drafts, at least so many.
        cached_tokens: of the prompt, found in the prefix cache when it first got a slot.
        keys: of its full pages, each hashed once; registered: how many of them the pool was told; generation: of the
            weights for which they hold, those at admission; awaits: key of a page that another sequence computes now.
    """

    request: Request
    arrival: int
    tokens: list[int]
    limit: int
    slot: int = -1
    epoch: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    goal: int = 0
    until: int = 0
    fetch: Fetch | None = None
    computed: int = 0
    unsure: int = 0
    launched: deque[tuple[int, int, int]] = dataclasses.field(default_factory=deque)
    pending: int = 0
    cached_tokens: int = 0
    keys: list[bytes] = dataclasses.field(default_factory=list)
    registered: int = 0
    generation: int = -1
    awaits: bytes | None = None

    @property
    def end(self) -> int:
        """Of the tokens known, how many chunks compute here."""
        export = self.request.export
        return len(self.tokens) if export is None else export.end

    @property
    def left(self) -> int:
        """Tokens that may still be drawn, whatever becomes of the drafts in flight."""
        return self.limit - len(self.tokens) - self.pending - self.unsure

    def wants_row(self) -> bool:
        """Whether a decode row may be launched: its chunks are, max_tokens leaves one whatever becomes of the drafts in flight,
        and a grammar has seen the last token."""
        unread = self.request.grammar is not None and self.launched
        return self.computed >= self.goal and self.left > 0 and not unread

    @property
    def order(self) -> tuple[int, int]:
        """Who is smaller comes first."""
        return self.request.priority, self.arrival


class Chunk(NamedTuple):
    """`tokens` at positions start, start + 1, ... of a sequence are computed.

    samples: they reach the last one that is known: the token after it is drawn.
    """

    running: Running
    epoch: int
    start: int
    tokens: list[int]
    samples: bool


class Row(NamedTuple):
    """The last token of a sequence is computed, which the device knows, and its draft, if any; the next one is drawn. All that
    so many times, one after the other."""

    running: Running
    epoch: int
    times: int = 1


class Step(NamedTuple):
    """What is computed together.

    admitted: sequences that got a slot in this step. preempted: sequences that lost slot and pages and wait again.
    """

    chunks: list[Chunk]
    rows: list[Row]
    admitted: list[Running]
    preempted: list[Running]

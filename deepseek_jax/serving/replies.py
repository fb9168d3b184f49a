"""The answer to a request as a client reads it: `Reply` makes it of the tokens, as they come."""

import bisect
import dataclasses
import functools
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from deepseek_jax.data.streaming import StopStrings, StreamDecoder
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serving.dialects import DIALECTS, Dialect, Thinking, ids_of
from deepseek_jax.serving.sections import Part, Sections

if TYPE_CHECKING:  # it leads to jax, which nothing here needs
    from deepseek_jax.serving.request import Token


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A whole call of the answer. arguments: a JSON object, as the model wrote it."""

    index: int
    id: str
    name: str
    arguments: str


class Spelled(NamedTuple):
    """A token in the text. text: its own, or "bytes:\\\\xe6\\\\x97" if these are no whole characters; raw: its bytes."""

    id: int
    text: str
    raw: bytes
    logprob: float | None


class Piece(NamedTuple):
    """A token of the answer with its log-probability (nats) and alternatives. offset: where it begins, in characters."""

    token: Spelled
    offset: int
    top: tuple[Spelled, ...] = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is new of an answer."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    pieces: tuple[Piece, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls or self.pieces)


class Speller:
    """Writes tokens as clients see them beside log-probabilities."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._spelled = functools.lru_cache(maxsize=1 << 16)(self._spell)

    def __call__(self, token_id: int, logprob: float | None) -> Spelled:
        return Spelled(token_id, *self._spelled(token_id), logprob)

    def _spell(self, token_id: int) -> tuple[str, bytes]:
        (raw,) = self._tokenizer.bytes_inside([token_id])
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


class Reply:
    """Reads the tokens of one request as they come.

    Stop strings end the content, not the reasoning, and are not looked for in tool calls. Ids that end a generation
    have no text. What is given in one piece or many is the same, however tokens come.

    Args:
        stop: checked stop strings (`data.streaming.check_stop`).
        include_stop: the stop string belongs to the content.
        prompt: the ids that the answer goes on from.
        thinking: how it begins (`Dialect.thinking`).
        tools: calls of tools are looked for, if the dialect has any.
        speller: gives `Delta.pieces`; None: there are none.
        silent: ids that have no text, as those that end a generation and special ones; None: all have theirs.

    Attributes:
        content, reasoning, calls: all that was given so far.
        ended: whether a stop string came; the caller then ends the request.
        count: tokens read; if it ended, up to the one that completed the stop string.
        finish_reason: once closed; "tool_calls" where it stopped after some.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        prompt: Sequence[int] = (),
        dialect: Dialect = DIALECTS["none"],
        thinking: Thinking = "none",
        tools: bool = False,
        speller: Speller | None = None,
        silent: Sequence[int] | None = (),
    ):
        call = dialect.call if tools else None
        named = ids_of(tokenizer) if call or thinking != "none" else {}
        self._decoder = StreamDecoder(tokenizer, silent is not None, prompt, named)
        self._silent = frozenset() if silent is None else frozenset((*tokenizer.stop_ids, *silent))
        self._sections = Sections(thinking, call)
        self._stop = StopStrings(stop, include_stop)
        self._speller = speller
        self._ends: list[int] = []  # characters after each token
        self.content, self.reasoning = "", ""
        self.calls: list[ToolCall] = []
        self.finish_reason: str | None = None

    @property
    def ended(self) -> bool:
        return self._stop.ended

    @property
    def count(self) -> int:
        return len(self._ends)

    def push(self, tokens: Sequence["Token"]) -> Delta:
        """What is new after these tokens more; those after a stop string do not count."""
        deltas = []
        for token in tokens:
            if self.ended:
                break
            offset = self._ends[-1] if self._ends else 0
            text = "" if token.id in self._silent else self._decoder.push(token.id)
            self._ends.append(offset + len(text))
            deltas.append(self._delta(self._sections.push(text), self._piece(token, offset)))
        return joined(deltas)

    def close(self, finish_reason: str) -> Delta:
        """What was held back, at the end. finish_reason: the engine's."""
        last = Delta()
        if not self.ended:
            parts = self._sections.push(self._decoder.flush()) + self._sections.close()
            last = self._delta(parts, ())
        held = self._stop.flush()
        self.content += held
        self.finish_reason = "stop" if self.ended else finish_reason
        if self.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return dataclasses.replace(last, content=last.content + held)

    def _piece(self, token: "Token", offset: int) -> tuple[Piece, ...]:
        if self._speller is None:
            return ()
        top = tuple(self._speller(i, logprob) for i, logprob in token.top)
        return (Piece(self._speller(token.id, token.logprob), offset, top),)

    def _delta(self, parts: Sequence[Part], pieces: tuple[Piece, ...]) -> Delta:
        content, reasoning = "", ""
        calls: list[ToolCall] = []
        for part in parts:
            if self.ended:
                break
            if part.kind == "reasoning":
                reasoning += part.text
            elif part.kind == "content":
                content += self._read(part)
            else:
                content += self._stop.flush()
                calls.append(ToolCall(len(self.calls) + len(calls), _call_id(), part.name, part.text))
        self.content += content
        self.reasoning += reasoning
        self.calls += calls
        return Delta(content, reasoning, tuple(calls), pieces)

    def _read(self, part: Part) -> str:
        before = self._stop.read
        text = self._stop.push(part.text)
        if self.ended:
            end = part.begin + self._stop.read - before
            del self._ends[bisect.bisect_left(self._ends, end) + 1 :]
        return text


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def joined(deltas: Sequence[Delta]) -> Delta:
    """One after the other, as one."""
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        "".join(d.content for d in deltas),
        "".join(d.reasoning for d in deltas),
        tuple(call for d in deltas for call in d.calls),
        tuple(piece for d in deltas for piece in d.pieces),
    )

"""Cuts an answer, as its text comes, into reasoning, content and tool calls, the same however the text is cut."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from deepseek_jax.data.streaming import begun
from deepseek_jax.serving.dialects import (
    CALL,
    CALLS,
    END_CALL,
    END_CALLS,
    END_THINK,
    SEP,
    THINK,
    TOOL_MARKERS,
    Format,
    Thinking,
)


class Part(NamedTuple):
    """A piece of the answer. begin: where it stands, in characters. name: of the function, if it is a call."""

    kind: Literal["reasoning", "content", "call"]
    text: str
    begin: int
    name: str = ""


class Sections:
    """Reads an answer.

    Reasoning and the content after it lose the white space around the tags. A tool call is given when it is whole; what
    is broken or never ends is content, as it stands there, and so is what stands between calls.

    Args:
        thinking: how the answer begins.
        call: how tool calls are written; None: the answer has none.
    """

    def __init__(self, thinking: Thinking, call: Format | None):
        self._call = call
        self._text, self._at = "", 0  # what is not read yet, and where it begins
        self._raw, self._raw_at = (
            "",
            0,
        )  # a call and the white space and markers before it, until it is decided
        self._calling = self._called = False  # inside a call; a call came since the calls began
        starts = {"open": self._lead_of_reasoning, "possible": self._opening, "none": self._content}
        self._state: Callable[[], list[Part] | None] = starts[thinking]
        self._last = False

    def push(self, text: str) -> list[Part]:
        """The parts that are certain after this text more."""
        self._text += text
        parts: list[Part] = []
        while (more := self._state()) is not None:
            parts += more
        return parts

    def close(self) -> list[Part]:
        """What is left at the end."""
        self._last = True
        parts = self.push("")
        if self._called and not self._raw.strip():  # white space after the last call
            self._raw = ""
        return parts + self._give_up() + self._take(len(self._text), "content")

    def _take(self, count: int, kind: Literal["reasoning", "content"] | None = None) -> list[Part]:
        """Goes on past so many characters, which are a part of this kind; None: of no part."""
        text, begin = self._text[:count], self._at
        self._text, self._at = self._text[count:], self._at + count
        return [Part(kind, text, begin)] if kind and text else []

    # --- states: each returns what it read, None if it waits for more --------------------------------------------

    def _opening(self) -> list[Part] | None:
        said = self._text.lstrip()
        if not self._last and THINK.startswith(said):
            return None
        if said.startswith(THINK):
            self._take(len(self._text) - len(said) + len(THINK))
            self._state = self._lead_of_reasoning
        else:
            self._state = self._content
        return []

    def _lead_of_reasoning(self) -> list[Part] | None:
        self._take(len(self._text) - len(self._text.lstrip()))
        if self._text:
            self._state = self._reasoning
        return [] if self._text else None

    def _reasoning(self) -> list[Part] | None:
        end = self._text.find(END_THINK)
        if end >= 0:
            parts = self._take(len(self._text[:end].rstrip()), "reasoning")
            self._take(self._text.index(END_THINK) + len(END_THINK))
            self._state = self._lead_of_content
            return parts
        certain = self._text[: len(self._text) - begun(self._text, [END_THINK])].rstrip()
        return self._take(len(self._text) if self._last else len(certain), "reasoning") or None

    def _lead_of_content(self) -> list[Part] | None:
        self._take(len(self._text) - len(self._text.lstrip()))
        if self._text:
            self._state = self._content
        return [] if self._text else None

    def _content(self) -> list[Part] | None:
        if self._call is None:
            return self._take(len(self._text), "content") or None
        lexeme = self._lexeme((CALLS, CALL))
        if lexeme in (CALLS, CALL):
            self._called, self._state = False, self._between
            return []
        return self._take(len(lexeme), "content") or None

    def _between(self) -> list[Part] | None:
        """Before and after calls."""
        lexeme = self._lexeme(TOOL_MARKERS)
        if lexeme == CALL:
            self._state = self._inside
            return self._hold(lexeme)
        if lexeme == CALLS and not self._raw.strip():
            return self._hold(lexeme)
        if lexeme == END_CALLS and self._called and not self._raw.strip():
            self._raw = ""
            self._take(len(lexeme))
            self._state = self._content
            return []
        if not lexeme.strip():
            return self._hold(lexeme) if lexeme else None
        self._state = self._content
        known = lexeme in (SEP, END_CALL, END_CALLS)  # a marker that stands alone
        return self._give_up() + (self._take(len(lexeme), "content") if known else [])

    def _inside(self) -> list[Part] | None:
        lexeme = self._lexeme(TOOL_MARKERS)
        if lexeme in (CALL, CALLS, END_CALLS):
            self._state = self._between
            return self._give_up()
        if lexeme != END_CALL:
            return self._hold(lexeme) if lexeme else None
        self._hold(lexeme)
        self._state = self._between
        assert self._call is not None
        found = self._call.read(self._raw[self._raw.index(CALL) :])
        if found is None:
            return self._give_up()
        self._raw, self._called = "", True
        return [Part("call", found[1], self._raw_at, found[0])]

    def _lexeme(self, markers: tuple[str, ...]) -> str:
        """A marker, if the text begins with one; else the text before one, as far as it is certain."""
        first = min((i for m in markers if (i := self._text.find(m)) >= 0), default=-1)
        if first == 0:
            return next(m for m in markers if self._text.startswith(m))
        if first > 0:
            return self._text[:first]
        return self._text[: len(self._text) - (0 if self._last else begun(self._text, markers))]

    def _hold(self, lexeme: str) -> list[Part]:
        self._raw_at = self._raw_at if self._raw else self._at
        self._raw += lexeme
        self._take(len(lexeme))
        return []

    def _give_up(self) -> list[Part]:
        """What is held is no call."""
        raw, self._raw = self._raw, ""
        return [Part("content", raw, self._raw_at)] if raw else []

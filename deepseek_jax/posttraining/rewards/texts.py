"""What a completion says: its text, its reasoning, its answer, its program."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_OPEN, _CLOSE = "<think>", "</think>"
_OPENS, _CLOSES = re.compile("```[^`]*"), re.compile("```[ \t]*")  # lines around a block of code
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Plain text as it is; of messages, the content of the last."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


def behind(prompt: str, text: str) -> str:
    """The text with the mark of reasoning that a prompt, rendered, has opened at its end: without it, reasoning that never ends
    would be taken for an answer."""
    return f"{_OPEN}{text}" if prompt.rstrip().endswith(_OPEN) else text


def reasoning(text: str) -> str:
    """What stands before the end of the reasoning, its tags left out; the whole text if it marks none."""
    before, closed, _ = text.partition(_CLOSE)
    return (before if closed else text).replace(_OPEN, "")


def said(text: str) -> str | None:
    """What stands after the reasoning; the whole text if it marks none, None if its reasoning never ends (of which a prompt may
    have the mark: `behind`)."""
    _, closed, after = text.rpartition(_CLOSE)
    return after if closed else None if _OPEN in text else text


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces inside it matched; None if there is none, or the last never closes."""
    begins = [match.end() for match in _BOX.finditer(text)]
    if not begins:
        return None
    depth, i = 1, begins[-1]
    while i < len(text):
        if text[i] == "\\":
            i += 2  # an escaped brace is none
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begins[-1] : i].strip()
        i += 1
    return None


def tagged(text: str, tag: str = "answer") -> str | None:
    """What stands in the last <answer>...</answer>; None if there is none, or the last never closes."""
    _, opened, after = text.rpartition(f"<{tag}>")
    inside, closed, _ = after.partition(f"</{tag}>")
    return inside.strip() if opened and closed else None


def program(text: str) -> str | None:
    """The last fenced block of code; None if there is none."""
    found: str | None = None
    block: list[str] | None = None  # the lines of the one that is open
    for line in text.split("\n"):
        if block is None:
            block = [] if _OPENS.fullmatch(line) else None
        elif _CLOSES.fullmatch(line):
            found, block = "".join(f"{one}\n" for one in block), None
        else:
            block.append(line)
    return found

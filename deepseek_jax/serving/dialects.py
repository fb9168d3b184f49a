"""How a checkpoint writes reasoning and tool calls: a `Dialect`, found from its tokenizer and chat template.

V3 and R1 write a call as TYPE<｜tool▁sep｜>NAME with the arguments in a fence of Markdown, V3.1 as NAME<｜tool▁sep｜>ARGUMENTS.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from deepseek_jax.checks import choice
from deepseek_jax.data.chat import ChatTemplate, Message
from deepseek_jax.data.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"
CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
TOOL_MARKERS = (CALLS, END_CALLS, CALL, SEP, END_CALL)
MARKERS = (THINK, END_THINK, *TOOL_MARKERS)
_ANSWERS = ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁end｜>")  # what an answer follows

# Whether an answer begins inside the reasoning, may open it, or has none.
Thinking = Literal["open", "possible", "none"]


@dataclasses.dataclass(frozen=True)
class Format:
    """How a tool call is written.

    Attributes:
        before, between, after: texts around name and arguments.
        joint: between two calls.
        pattern: what is read, with more freedom: groups name and arguments.
    """

    before: str
    between: str
    after: str
    joint: str
    pattern: re.Pattern[str]

    def read(self, text: str) -> tuple[str, str] | None:
        """(name, arguments as they stand there) of a call, markers included; None if it is none, or broken."""
        found = self.pattern.fullmatch(text)
        if not found:
            return None
        try:
            json.loads(found["arguments"], parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        return found["name"], found["arguments"]

    def write(self, name: str, arguments: str) -> str:
        return f"{self.before}{name}{self.between}{arguments}{self.after}"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _pattern(head: str) -> re.Pattern[str]:
    fenced = r"\s*(?P<fence>```(?:json)?\s*)?(?P<arguments>\{.*\})\s*(?(fence)```)\s*"
    return re.compile(f"{CALL}{head}{fenced}{END_CALL}", re.DOTALL)


_NAME = r"[ \t]*(?P<name>[^\s<>`]+)"
V3_CALL = Format(
    f"{CALL}function{SEP}",
    "\n```json\n",
    f"\n```{END_CALL}",
    "\n",
    _pattern(rf"\s*\w+\s*{SEP}{_NAME}[ \t]*\n"),
)
V31_CALL = Format(CALL, SEP, END_CALL, "", _pattern(rf"\s*{_NAME}\s*{SEP}"))


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Attributes: reasons: answers may begin with <think>. call: how tool calls are written; None: never."""

    reasons: bool = False
    call: Format | None = None

    def thinking(self, prompt: str) -> Thinking:
        """How an answer to the rendered prompt begins."""
        if not self.reasons:
            return "none"
        begin = max((prompt.rfind(mark) + len(mark) for mark in _ANSWERS if mark in prompt), default=None)
        said = prompt[begin:].rstrip()
        if begin is None:  # other turns than DeepSeek's: where the answer begins is not known
            said = next((mark for mark in (THINK, END_THINK) if said.endswith(mark)), "")
        if said.rfind(THINK) > said.rfind(END_THINK):
            return "open"
        return "none" if said else "possible"


DIALECTS: Mapping[str, Dialect] = {
    "none": Dialect(),
    "v3": Dialect(call=V3_CALL),
    "r1": Dialect(reasons=True, call=V3_CALL),
    "v3.1": Dialect(reasons=True, call=V31_CALL),
}


_PROBE = '{"probe": 1}'


def _probe(template: ChatTemplate, arguments: Any) -> str:
    """A conversation with one tool call; "" if the template takes none of this form."""
    function = {"name": "probe", "arguments": arguments}
    call = {"id": "call_0", "type": "function", "function": function}
    turns: list[Message] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        return template.render(turns, add_generation_prompt=False)
    except ValueError:
        return ""


def wants_objects(template: ChatTemplate) -> bool:
    """Whether the template writes the arguments of earlier calls as JSON itself, of objects; others take their text."""
    return _PROBE not in _probe(template, _PROBE) and bool(_probe(template, json.loads(_PROBE)))


def dialect_of(tokenizer: Tokenizer, name: str | None = None) -> Dialect:
    """The dialect `name`, a key of `DIALECTS`; None: what the chat template shows. Raises ValueError: no such name."""
    if name is not None:
        choice("dialect", name, tuple(DIALECTS))
        return DIALECTS[name]
    try:
        template = tokenizer.chat_template
    except ValueError:
        return DIALECTS["none"]
    shown = _probe(template, _PROBE)
    call = next((form for form in (V3_CALL, V31_CALL) if form.write("probe", _PROBE) in shown), None)
    return Dialect(template.mentions("think>"), call)


def ids_of(tokenizer: Tokenizer) -> Mapping[int, str]:
    """The markers that are tokens, by id."""
    return {i: mark for mark in MARKERS if (i := tokenizer.id_of(mark)) is not None}

"""`ChatTemplate` renders chat prompts with a tokenizer's own Jinja template.

Templates see the environment that `transformers` gives them (a sandbox, the same filters, functions and tags), so
that they render the same text.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError, UndefinedError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_jax.checks import require, shown
from deepseek_jax.data.special_tokens import SPECIAL_TOKENS

# DeepSeek-V3's turns, for tokenizers that come without a template.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no turns for role ' + m['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")
# Names for the same; the first is what templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Stands at the end of a message that is to be continued, while it is rendered.
_END_OF_TEXT = "END_OF_THE_TEXT_TO_CONTINUE"

Message = Mapping[str, Any]


@dataclasses.dataclass
class _Record:
    """A rendering: the pieces so far, and the spans [begin, end) of characters that the assistant says."""

    pieces: list[str] = dataclasses.field(default_factory=list)
    spans: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} around what the assistant says: its span goes to the record."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    @pass_context
    def _said(self, context: Context, caller: Callable[[], str]) -> str:
        text, record = caller(), context["_record"]
        begin = sum(map(len, record.pieces))
        record.spans.append((begin, begin + len(text)))
        return text


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


class ChatTemplate:
    """Turns messages into the text of a prompt. A faulty template raises when it is used, or by `check`.

    Args:
        sources: Jinja texts by name, or one text. "default" is used, "tool_use" for conversations with tools.
        tokens: named special tokens that templates see, "bos_token" and so on; default: DeepSeek's.
    """

    def __init__(
        self, sources: str | Mapping[str, str] = DEFAULT_TEMPLATE, tokens: Mapping[str, str] | None = None
    ):
        self._sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        names = {f"{name}_token": SPECIAL_TOKENS[name] for name in ("bos", "eos")}
        self._tokens = names if tokens is None else dict(tokens)

    @property
    def sources(self) -> Mapping[str, str]:
        """The Jinja texts by name, and the tokens that they see: what decides a rendering."""
        return self._sources | self._tokens

    @property
    def source(self) -> str | None:
        """The Jinja text that conversations without tools use."""
        return self._sources.get("default")

    def check(self) -> None:
        """Raises ValueError for a template that is no Jinja."""
        for name, source in self._sources.items():
            try:
                _compiled(source)
            except TemplateError as error:
                raise ValueError(f"chat template {name!r}: {error}") from error

    def mentions(self, text: str) -> bool:
        """Whether one of the templates has this in it."""
        return any(text in source for source in self._sources.values())

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        continue_final_message: bool = False,
        **switches: Any,
    ) -> str:
        """Renders the prompt of a conversation of {"role", "content"} messages, oldest first.

        Args:
            messages: with whatever else the template reads ("tool_calls", "reasoning_content"); content may be
                missing then, or a list of parts.
            tools: JSON schemas of functions.
            documents: {"title", "text"} of each.
            continue_final_message: ends with the last message's content, so that the answer goes on with it.
            switches: further variables of the template, as `enable_thinking`.

        Raises ValueError for no message, one without these keys or with an unknown role, for a template that is no
        Jinja, and for what it itself refuses.
        """
        options = {"tools": tools, "documents": documents} | switches
        if not continue_final_message:
            return self.render_spans(messages, add_generation_prompt, **options)[0]
        require(not add_generation_prompt, "a prompt that continues the last message begins no other turn")
        last = dict(messages[-1]) if messages else {}
        content = last.get("content")
        require(
            isinstance(content, str), f"message {shown(last)} cannot be continued: it has no text content"
        )
        marked = [*messages[:-1], {**last, "content": f"{content}{_END_OF_TEXT} "}]
        text = self.render_spans(marked, **options)[0]
        require(_END_OF_TEXT in text, "the chat template leaves the last message out: it cannot be continued")
        before, _, after = text.rpartition(_END_OF_TEXT)
        return (
            before if after.startswith(" ") else before.rstrip()
        )  # a template that trims has trimmed the mark

    def render_spans(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Renders as `render` does, and returns the spans [begin, end) of characters inside {% generation %} blocks."""
        variables = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        } | options
        source = self._source(variables["tools"])
        require(bool(messages), "a conversation needs at least one message")
        said = [_message(i, message, source) for i, message in enumerate(messages)]
        try:
            template = _compiled(source)
            try:
                record = self._run(template, said, variables)
            except UndefinedError:
                # DeepSeek's ask whether content is none; a missing one ends them.
                with_content: list[dict[str, Any]] = [{"content": None} | message for message in said]
                record = self._run(template, with_content, variables)
        except Exception as error:  # templates are programs: they raise anything
            raise ValueError(f"chat template: {error}") from error
        return "".join(record.pieces), record.spans

    def _run(self, template: Template, messages: list[dict[str, Any]], variables: dict[str, Any]) -> _Record:
        record = _Record()
        given = self._tokens | {"messages": messages, "_record": record} | variables
        for piece in template.generate(given):
            record.pieces.append(piece)
        return record

    def _source(self, tools: Any) -> str:
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise ValueError(f"there is no chat template named 'default' among {sorted(self._sources)}")
        return self._sources[name]


def _message(i: int, message: Message, source: str) -> dict[str, Any]:
    """Returns the message as templates see it: fields that are None are gone, its reasoning has the usual names."""
    given = {key: value for key, value in message.items() if value is not None}
    role, content = given.get("role"), given.get("content", "")
    known = isinstance(role, str) and (role in ROLES or role in source)
    text = isinstance(content, str) or (
        isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
    )
    if not (known and text and len(given) > 1):
        raise ValueError(
            f"message {i} is {shown(dict(message))}: it needs a role of {ROLES} and text content"
        )
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning} | given | {_REASONING[0]: reasoning}

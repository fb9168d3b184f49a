"""The fields of a row of conversations: messages as templates read them, tools, and the question that it asks."""

import json
from collections.abc import Mapping
from typing import Any

from deepseek_jax.checks import require, shown
from deepseek_jax.data.chat import ChatTemplate, Message


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Messages as templates read them: fields that are None are gone, parts of content are joined. Raises ValueError."""
    require(isinstance(value, list) and bool(value), f"messages={shown(value)} should be a list of messages")
    return [_message(i, message) for i, message in enumerate(value)]


def _message(i: int, message: Any) -> dict[str, Any]:
    good = isinstance(message, Mapping) and isinstance(message.get("role"), str)
    require(good, f'message {i} is {shown(message)}: it should be {{"role", "content"}}')
    given = {name: value for name, value in message.items() if value is not None}
    if isinstance(given.get("content"), list):
        parts: list[Any] = [p.get("text") if isinstance(p, Mapping) else None for p in given["content"]]
        require(
            all(isinstance(p, str) for p in parts),
            f"message {i} has parts that are no text: {shown(message)}",
        )
        given["content"] = "".join(parts)
    if not given.get("tool_calls"):  # an empty list is no call, though templates take it for one
        given.pop("tool_calls", None)
        require(
            isinstance(given.get("content", ""), str), f"message {i} has no text content: {shown(message)}"
        )
    return given


def reasoning_of(message: Message) -> str:
    """The reasoning that stands in a field of its own, "" without one. Raises ValueError: no text."""
    value = next((message[n] for n in ("reasoning_content", "thinking", "reasoning") if message.get(n)), "")
    require(isinstance(value, str), f"reasoning_content={shown(value)} should be a text")
    return str(value)


def learned_of(message: Message) -> bool:
    """Whether an answer is learned: OpenAI's "weight" 0 says that it is not. Raises ValueError: neither 0 nor 1."""
    weight = message.get("weight", 1)
    require(weight in (0, 1), f'"weight"={shown(weight)} of a message should be 0 or 1')
    return bool(weight)


def options_of(given: Mapping[str, Any], template: ChatTemplate) -> dict[str, Any]:
    """A row's "tools", as a list or its JSON, and "chat_template_kwargs", for the template. Raises ValueError for what is none,
    and for tools that the template would leave out."""
    tools, switches = given.get("tools"), given.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools={shown(tools)} is no JSON: {error}") from error
    require(tools is None or isinstance(tools, list), f"tools={shown(tools)} should be a list")
    require(isinstance(switches, Mapping), f"chat_template_kwargs={shown(switches)} should be an object")
    known = not tools or template.mentions("tools")
    require(known, "tools: the chat template does not write them; say them in a system message")
    return {"tools": tools or None} | dict(switches)


def question_of(values: Mapping[str, Any]) -> str:
    """What a row asks, by which rows are held out (held_out.py): the words of the user before the first answer.

    A system prompt does not count, so that a question is on one side whatever stands before it. Of a text: the text. A row that
    is about another question, as a judgement is, names that in its field "held_out_by". Raises ValueError for messages that are
    none.
    """
    if isinstance(values.get("held_out_by"), str):
        return str(values["held_out_by"])
    given = values.get("messages") or values.get("prompt")
    if given is None or isinstance(given, str):
        return str(given if given is not None else values.get("text"))
    messages = messages_of(given)
    answers = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    before = messages[: next(answers, None)]
    asked = [str(m.get("content", "")) for m in before if m["role"] != "system"]
    return "\n".join(asked or [str(m.get("content", "")) for m in messages])

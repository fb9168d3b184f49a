"""The conversation that a client sends, in OpenAI's form, as the checkpoint's chat template reads it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.checks import require, shown
from deepseek_jax.data.chat import ChatTemplate, Message
from deepseek_jax.serving.dialects import CALLS, END_CALLS, Dialect, Format, wants_objects

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def prompt_of(
    template: ChatTemplate,
    messages: Sequence[Message],
    dialect: Dialect,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **switches: Any,
) -> str:
    """The prompt's text.

    Parts of content are joined, a developer is the system where the template knows none, arguments of earlier calls are
    text or objects as the template wants them, and tools that the template does not write stand at the end of the system
    turn, in the words that DeepSeek gives.

    Args:
        tools: OpenAI's; of a `tool_choice` of none, none.
        continue_final_message: the answer goes on with the last message, which is not ended (DeepSeek's `prefix`).
        switches: further variables of the template ("thinking", "enable_thinking").

    Raises ValueError for messages that are none, and for what the template refuses.
    """
    require(isinstance(messages, list | tuple), f"messages={shown(messages)} must be a list")
    said = [_message(i, message, template) for i, message in enumerate(messages)]
    if tools and not template.mentions("tools"):
        said = _told(said, tools, dialect)
        tools = ()
    return template.render(
        said,
        add_generation_prompt and not continue_final_message,
        tools=list(tools) or None,
        continue_final_message=continue_final_message,
        **switches,
    )


def _message(i: int, message: Any, template: ChatTemplate) -> dict[str, Any]:
    require(isinstance(message, Mapping), f"messages[{i}]={shown(message)} must be an object")
    given = {key: value for key, value in message.items() if value is not None}
    if given.get("role") == "developer" and not template.mentions("developer"):
        given["role"] = "system"
    if given.get("role") == "function":
        given["role"] = "tool"
    if isinstance(given.get("content"), list):
        given["content"] = "".join(_part(i, part) for part in given["content"])
    calls = given.pop("tool_calls", None)
    if not calls and given.get("role") == "assistant":
        given.setdefault("content", "")
    require(bool(calls) or "content" in given, f"messages[{i}]={shown(message)} has no content")
    if calls:  # an empty list is no call, though templates take it for one
        require(isinstance(calls, list), f"messages[{i}].tool_calls={shown(calls)} must be a list")
        given["tool_calls"] = [
            _call(f"messages[{i}].tool_calls[{k}]", c, template) for k, c in enumerate(calls)
        ]
    return given


def _part(i: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("refusal" if kind == "refusal" else "text") if kind in _TEXT_PARTS else None
    require(
        isinstance(text, str), f"messages[{i}].content has {shown(part)}: the model reads parts of text only"
    )
    return str(text)


def _call(where: str, call: Any, template: ChatTemplate) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    good = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    require(good, f"{where}={shown(call)} must have a function with a name")
    assert isinstance(function, Mapping)
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str) and wants_objects(template):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"{where}.function.arguments={shown(arguments)} is no JSON: {error}") from error
    elif not isinstance(arguments, str) and not wants_objects(template):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


# --- tools in words -------------------------------------------------------------------------------------------------


def _told(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], dialect: Dialect
) -> list[dict[str, Any]]:
    if dialect.call is None:
        raise ValueError("tools: the checkpoint's chat template has no tool calls")
    words = tools_in_words(tools, dialect.call)
    if messages and messages[0].get("role") == "system":
        first = messages[0]
        return [{**first, "content": f"{first.get('content', '')}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def tools_in_words(tools: Sequence[Mapping[str, Any]], call: Format) -> str:
    """What DeepSeek-V3.1's model card tells a model of its tools, with the dialect's own form of a call."""
    described = "\n\n".join(_described(tool["function"]) for tool in tools)
    return (
        f"## Tools\nYou have access to the following tools:\n\n{described}\n\n"
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        f"{CALLS}{call.write('tool_call_name', 'tool_call_arguments')}{{additional_tool_calls}}{END_CALLS}\n\n"
        "Where:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces"
    )


def _described(function: Mapping[str, Any]) -> str:
    parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
    return (
        f"### {function['name']}\nDescription: {function.get('description', '')}\n\nParameters: {parameters}"
    )

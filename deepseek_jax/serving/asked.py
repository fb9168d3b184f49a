"""What a request's body asks of the form of an answer, as a grammar's `Spec`: JSON, a regex, a choice, calls of tools."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepseek_jax.checks import require, shown
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serving.dialects import CALLS, END_CALLS, MARKERS, Dialect, Format
from deepseek_jax.serving.grammar import Grammars, Spec, schema_text

# vLLM's names beside OpenAI's, as they were before `structured_outputs`.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
FORMS = ("response_format", "structured_outputs", *_GUIDED)  # the fields that `spec_of` reads
_NAME = re.compile(r"[\w.:/-]{1,128}")
ANY_OBJECT = {"type": "object"}


def spec_of(body: Mapping[str, Any]) -> Spec | None:
    """What `response_format`, `structured_outputs` ({"json": ...}, "regex", "choice", "grammar" or "json_object") and
    vLLM's older `guided_...` ask for; None: anything. Raises ValueError for what is none of it, or for two at once."""
    found = []
    if body.get("response_format") is not None:
        found.append(_of_format(body["response_format"]))
    outputs = body.get("structured_outputs")
    if outputs is not None:
        require(isinstance(outputs, Mapping), f"structured_outputs={shown(outputs)} must be an object")
        found += [_of_output(kind, value) for kind, value in outputs.items() if value is not None]
    found += [_of_output(kind, body[name]) for name, kind in _GUIDED.items() if body.get(name) is not None]
    specs = [spec for spec in found if spec is not None]
    require(
        len(specs) <= 1, "an answer can have one form: give one of response_format and structured_outputs"
    )
    return specs[0] if specs else None


def _of_format(value: Any) -> Spec | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _json(ANY_OBJECT)
    known = kind == "json_schema"
    require(known, f"response_format={shown(value)} must have a type of text, json_object or json_schema")
    named = value.get("json_schema")
    given = isinstance(named, Mapping) and isinstance(named.get("schema"), Mapping | bool)
    require(given, f'response_format={shown(value)} needs a schema: {{"json_schema": {{"schema": {{...}}}}}}')
    return _json(named["schema"])


def _of_output(kind: str, value: Any) -> Spec | None:
    readers: dict[str, Callable[[Any], Spec | None]] = {
        "json": _json,
        "json_object": lambda given: _json(ANY_OBJECT) if given else None,
        "regex": lambda given: Spec("regex", _text("regex", given)),
        "choice": _choice,
        "grammar": lambda given: Spec("lark", _text("grammar", given)),
    }
    require(kind in readers, f"structured_outputs.{kind} is not known: {sorted(readers)}")
    return readers[kind](value)


def _json(schema: Any) -> Spec:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ValueError(f"the JSON schema {shown(schema)} is no JSON: {error}") from error
    require(isinstance(schema, Mapping | bool), f"the JSON schema {shown(schema)} must be an object")
    return Spec("json_schema", schema_text(schema))


def _text(name: str, value: Any) -> str:
    require(isinstance(value, str) and value != "", f"{name}={shown(value)} must be a text")
    return str(value)


def _choice(value: Any) -> Spec:
    good = isinstance(value, Sequence) and len(value) > 0 and all(isinstance(x, str) and x for x in value)
    require(good and not isinstance(value, str), f"choice={shown(value)} must be a list of texts")
    return Spec("lark", "start: " + " | ".join(map(_quoted, value)))


# --- tools ----------------------------------------------------------------------------------------------------------


def check_tools(tools: Any) -> dict[str, Mapping[str, Any]]:
    """The functions of OpenAI's `tools`, by name. Raises ValueError: what is none, or a name that is no name or twice."""
    listed = [] if tools is None else tools
    require(isinstance(listed, list), f"tools={shown(tools)} must be a list")
    found: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(listed):
        function: Any = tool.get("function") if isinstance(tool, Mapping) else None
        good = isinstance(function, Mapping) and tool.get("type", "function") == "function"
        require(good, f'tools[{i}]={shown(tool)} must be {{"type": "function", "function": {{...}}}}')
        name, parameters = function.get("name"), function.get("parameters")
        require(
            isinstance(name, str) and bool(_NAME.fullmatch(name)),
            f"tools[{i}].function.name={shown(name)} must be a word",
        )
        require(name not in found, f"tools[{i}].function.name={shown(name)} stands there twice")
        good = parameters is None or isinstance(parameters, Mapping)
        require(good, f"tools[{i}].function.parameters={shown(parameters)} must be a JSON schema")
        found[name] = function
    return found


def tool_choice(value: Any, functions: Mapping[str, Any]) -> tuple[str, list[str]]:
    """("none" | "auto" | "required", names that may be called) of OpenAI's `tool_choice`. Raises ValueError."""
    value = ("auto" if functions else "none") if value is None else value
    if value in ("none", "auto", "required"):
        require(value != "required" or bool(functions), "tool_choice=required needs tools")
        return value, list(functions) if value != "none" else []
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    require(
        isinstance(name, str), f"tool_choice={shown(value)} must be none, auto, required or name a function"
    )
    require(name in functions, f"tool_choice names {shown(name)}, which is not one of {sorted(functions)}")
    return "required", [str(name)]


def calls_spec(
    functions: Sequence[Mapping[str, Any]],
    dialect: Dialect,
    tokenizer: Tokenizer,
    grammars: Grammars,
    many: bool = True,
) -> Spec:
    """Calls of these functions, and nothing else. many: one or more instead of one.

    A schema of parameters that cannot be used stands for any object, unless the function says "strict". Raises
    ValueError: the dialect has no calls; a strict schema that cannot be used.
    """
    call = dialect.call
    if call is None:
        raise ValueError(
            "tool_choice: the checkpoint's chat template has no tool calls, so none can be required"
        )
    ids = {mark: i for mark in MARKERS if (i := tokenizer.id_of(mark)) is not None}
    rules = [f"call_{i}: {_call(call, function, ids, grammars)}" for i, function in enumerate(functions)]
    one = " | ".join(f"call_{i}" for i in range(len(functions)))
    lines = [
        f"start: {_terms(CALLS, ids)} call {f'({_terms(call.joint, ids)} call)*' if many else ''} {_terms(END_CALLS, ids)}",
        f"call: {one}",
        *rules,
    ]
    return Spec("lark", "\n".join(lines))


def _call(call: Format, function: Mapping[str, Any], ids: Mapping[str, int], grammars: Grammars) -> str:
    schema = function.get("parameters") or ANY_OBJECT
    try:
        grammars.constraint(_json(schema))
    except ValueError:
        if function.get("strict"):
            raise
        schema = ANY_OBJECT
    before, after = call.before + function["name"] + call.between, call.after
    return f"{_terms(before, ids)} %json {schema_text(schema)} {_terms(after, ids)}"


def _terms(text: str, ids: Mapping[str, int]) -> str:
    """A text as Lark's terms; markers that are tokens by their ids."""
    for mark, i in ids.items():
        text = text.replace(mark, f"\0{i}\0")
    parts = text.split("\0")
    return " ".join(f"<[{part}]>" if i % 2 else _quoted(part) for i, part in enumerate(parts) if part)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

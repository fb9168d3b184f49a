"""What a request for an answer asks for: read and checked, not yet tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.serving.asked import FORMS, check_tools, spec_of, tool_choice
from deepseek_jax.serving.grammar import Spec
from deepseek_jax.serving.request import TOP
from deepseek_jax.serving.sampling import Sampling
from deepseek_jax.serving.server.errors import bad, refused
from deepseek_jax.serving.server.fields import Fields, is_ids

Prompt = str | list[int]

_SAMPLES = 128  # of a prompt
_STOPS, _STOP, _STOP_IDS = 32, 1000, 256  # stop strings, characters of one, and stop ids
_HUGE = 1 << 31
_TAKEN = frozenset(
    ("template", "messages", "dialect", "tools", "add_generation_prompt", "continue_final_message")
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What both endpoints take.

    Attributes:
        model: None: the one that is served.
        n: samples of each prompt.
        max_tokens: None: not said.
        sampling, min_tokens, stop_ids, logprobs, prompt_logprobs, salt, priority: see `serving/request.py: Request`.
        seed: None: one of its own.
        stop: strings that end the text and are left out.
        ignore_eos: the checkpoint's own stop ids do not end it.
        stream: as server-sent events; with usage at their end, or in each.
        spec: what the answer must match; None: anything.
        token_ids: give the ids of the tokens, too.
    """

    model: str | None
    n: int
    max_tokens: int | None
    min_tokens: int
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    salt: str
    priority: int
    stream: bool
    usage: bool
    usage_always: bool
    spec: Spec | None
    token_ids: bool


@dataclasses.dataclass(frozen=True)
class CompletionAsked:
    """A request to /v1/completions. suffix: None, or the text after the gap that is to be filled."""

    options: Options
    prompts: tuple[Prompt, ...]
    echo: bool
    suffix: str | None
    special: bool
    ids_as_tokens: bool


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A prompt in turns.

    Attributes:
        messages, tools: as they came.
        callable: the functions that may be called, as `check_tools` gives them.
        must_call, many: a call must come; more than one may.
        goes_on: with the last message, which is not ended.
        switches: of the chat template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    callable: Sequence[Mapping[str, Any]]
    must_call: bool
    many: bool
    goes_on: bool
    switches: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ChatAsked:
    """A request to /v1/chat/completions."""

    options: Options
    conversation: Conversation


def completion(fields: Fields) -> CompletionAsked:
    options = _options(fields, fields.integer("max_tokens", None, 0, _HUGE), _completion_logprobs(fields))
    best_of = fields.integer("best_of", options.n)
    fields.check(
        best_of == options.n, "best_of", f"n={options.n}: samples are not ranked here; ask for n of them"
    )
    prompts = _prompts(fields)
    suffix = fields.text("suffix")
    texts = all(isinstance(prompt, str) for prompt in prompts)
    fields.check(suffix is None or texts, "suffix", "left out where the prompt is token ids")
    echo = fields.flag("echo")
    fields.check(not (echo and suffix is not None), "echo", "false with a suffix")
    special, as_ids = fields.flag("add_special_tokens", True), fields.flag("return_tokens_as_token_ids")
    return CompletionAsked(options, prompts, echo, suffix, special, as_ids)


def chat(fields: Fields) -> ChatAsked:
    most = fields.integer("max_completion_tokens", fields.integer("max_tokens", None, 1, _HUGE), 1, _HUGE)
    return ChatAsked(_options(fields, most, _chat_logprobs(fields)), conversation(fields))


def conversation(fields: Fields) -> Conversation:
    fields.needed("messages")
    messages = fields.objects("messages")
    fields.check(bool(messages), "messages", "at least one message")
    with refused("tools"):
        functions = check_tools(fields.get("tools"))
    with refused("tool_choice"):
        choice, names = tool_choice(fields.get("tool_choice"), functions)
    one = choice == "required" and isinstance(fields.get("tool_choice"), dict)
    return Conversation(
        messages=messages,
        tools=fields.get("tools") if choice != "none" and functions else (),
        callable=[functions[name] for name in names],
        must_call=choice == "required",
        many=fields.flag("parallel_tool_calls", True) and not one,
        goes_on=fields.flag("continue_final_message"),
        switches=_switches(fields),
    )


def _switches(fields: Fields) -> dict[str, Any]:
    switches = {**fields.mapping("chat_template_kwargs")}
    for name in sorted(_TAKEN & switches.keys()):
        raise bad(f"chat_template_kwargs has {name!r}: that has a field of its own", "chat_template_kwargs")
    return switches | {"add_generation_prompt": fields.flag("add_generation_prompt", True)}


def _spec(fields: Fields) -> Spec | None:
    asked = {name: fields.get(name) for name in FORMS}
    with refused("response_format" if asked["response_format"] is not None else None):
        return spec_of(asked)


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    value = fields.needed("prompt")
    words = "a string, token ids, or a list of such that is not empty"
    fields.check(isinstance(value, str) or (isinstance(value, list) and len(value) > 0), "prompt", words)
    if isinstance(value, str) or is_ids(value):
        return (value,)
    good = all(isinstance(x, str) for x in value) or all(isinstance(x, list) and is_ids(x) for x in value)
    fields.check(good, "prompt", words)
    return tuple(value)


def _completion_logprobs(fields: Fields) -> int | None:
    return fields.integer("logprobs", None, 0, TOP)


def _chat_logprobs(fields: Fields) -> int | None:
    asked, top = fields.flag("logprobs"), fields.integer("top_logprobs", None, 0, TOP)
    fields.check(asked or not top, "top_logprobs", "left out unless logprobs is true")
    return (top or 0) if asked else None


def _options(fields: Fields, max_tokens: int | None, logprobs: int | None) -> Options:
    stream, extra = fields.flag("stream"), fields.section("stream_options")
    fields.check(
        stream or fields.get("stream_options") is None, "stream_options", "left out unless stream is true"
    )
    min_tokens = fields.integer("min_tokens", 0, 0, _HUGE)
    fields.check(
        max_tokens is None or min_tokens <= max_tokens, "min_tokens", f"at most max_tokens={max_tokens}"
    )
    stop = fields.texts("stop", _STOPS)
    fields.check(all(len(x) <= _STOP for x in stop), "stop", f"strings of at most {_STOP} characters")
    always = extra.flag("continuous_usage_stats")
    return Options(
        model=fields.text("model"),
        n=fields.integer("n", 1, 1, _SAMPLES),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=_sampling(fields),
        seed=fields.integer("seed", None, -(1 << 63), (1 << 64) - 1),
        stop=stop,
        stop_ids=fields.ids("stop_token_ids", _STOP_IDS),
        ignore_eos=fields.flag("ignore_eos"),
        logprobs=logprobs,
        prompt_logprobs=fields.integer("prompt_logprobs", None, 0, TOP),
        salt=fields.text("cache_salt", ""),
        priority=fields.integer("priority", 0, -_HUGE, _HUGE - 1),
        stream=stream,
        usage=extra.flag("include_usage") or always,
        usage_always=always,
        spec=_spec(fields),
        token_ids=fields.flag("return_token_ids"),
    )


def _sampling(fields: Fields) -> Sampling:
    top_k = fields.integer("top_k", 0, -1, _HUGE - 1)
    with refused():
        return Sampling(
            temperature=fields.number("temperature", 1.0, 0),
            top_p=fields.number("top_p", 1.0),
            top_k=max(top_k, 0),  # -1: all, as vLLM has it
            min_p=fields.number("min_p", 0.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0),
            presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
            frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
            logit_bias=_logit_bias(fields),
        )


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    given = fields.mapping("logit_bias")
    bias = Fields(given, "logit_bias.")
    good = all(key.isascii() and key.isdigit() and len(key) < 10 for key in given)
    fields.check(good, "logit_bias", "an object with token ids as its keys")
    return tuple((int(key), bias.number(key, 0.0, -100, 100)) for key in given)

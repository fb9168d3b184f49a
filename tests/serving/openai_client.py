"""What an unmodified `openai` client gets from a server: each check takes a client, and raises where it is not what OpenAI's
own API gives. `CHECKS` has them by name; the tests run some, `python -m tests.serving.clients` all.

The model's weights are random: what it says means nothing, but must be the same however it is asked for.
"""

import asyncio
import json

import openai
import pytest

PROMPT = "the keys and the values share"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Rome", "Oslo"]},
                "days": {"type": "integer", "maximum": 9, "minimum": 1},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"high": {"type": "boolean"}, "units": {"enum": ["celsius", "kelvin"]}},
    "required": ["high", "units"],
    "additionalProperties": False,
}


def _complete(client, **options):
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | options
    return client.completions.create(**options)


def _chat(client, content="what is the wind?", **options):
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": content}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(**options)


def models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.max_model_len > 0
    assert client.models.retrieve("tiny").id == "tiny"


def completion(client):
    done = _complete(client)
    (choice,) = done.choices
    assert choice.finish_reason == "length" and choice.text
    assert done.usage.completion_tokens == 12 and done.usage.prompt_tokens > 0
    assert done.usage.total_tokens == done.usage.prompt_tokens + 12
    assert _complete(client, max_tokens=openai.omit).usage.completion_tokens == 16  # OpenAI's default


def completion_stream(client):
    whole = _complete(client, max_tokens=100)
    events = list(_complete(client, max_tokens=100, stream=True, stream_options={"include_usage": True}))
    assert len({event.id for event in events}) == 1 and len({event.created for event in events}) == 1
    *parts, last = events
    assert "".join(event.choices[0].text for event in parts) == whole.choices[0].text
    assert [e.choices[0].finish_reason for e in parts][-1] == "length" and last.choices == []
    assert last.usage.completion_tokens == 100 and all(event.usage is None for event in parts)
    assert len(parts) > 2  # it came in pieces


def many_prompts(client):
    texts = ["the keys", "the values", "the latent"]
    done = _complete(client, prompt=texts)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    for text, choice in zip(texts, done.choices, strict=True):
        assert choice.text == _complete(client, prompt=text).choices[0].text


def echo_and_logprobs(client):
    done = _complete(client, echo=True, logprobs=2, max_tokens=4)
    (choice,) = done.choices
    given = choice.logprobs
    assert choice.text.startswith(PROMPT)
    assert len(given.tokens) == len(given.token_logprobs) == len(given.text_offset)
    assert len(given.tokens) == done.usage.total_tokens
    assert given.token_logprobs[0] is None and all(x <= 0 for x in given.token_logprobs[1:])
    for logprob, top in zip(given.token_logprobs[-4:], given.top_logprobs[-4:], strict=True):
        assert logprob == pytest.approx(max(top.values()), abs=1e-4)  # greedy: the likeliest


def seeds_and_n(client):
    """A seed is a text; samples of one request differ, and stay the same whether they come alone or together."""
    drawn = {"temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 16, "extra_body": {"ignore_eos": True}}
    first, again = _complete(client, **drawn), _complete(client, **drawn)
    texts = [choice.text for choice in first.choices]
    assert [choice.text for choice in again.choices] == texts and len(set(texts)) == 3
    assert _complete(client, **drawn | {"n": 1}).choices[0].text == texts[0]
    assert _complete(client, **drawn | {"seed": 8}).choices[0].text != texts[0]
    assert first.usage.completion_tokens == 48


def stop(client):
    text = _complete(client, max_tokens=24).choices[0].text
    mark = text[len(text) // 2 :][:2]
    want = text[: text.index(mark)]
    (choice,) = _complete(client, max_tokens=24, stop=[mark, "never said"]).choices
    assert choice.text == want and choice.finish_reason == "stop"
    streamed = list(_complete(client, max_tokens=24, stop=mark, stream=True))
    assert "".join(event.choices[0].text for event in streamed) == want
    assert streamed[-1].choices[0].finish_reason == "stop"


def chat(client):
    done = _chat(client)
    message = done.choices[0].message
    assert message.role == "assistant" and message.content and done.choices[0].finish_reason == "length"
    deltas = [event.choices[0].delta for event in _chat(client, stream=True)]
    assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == message.content


def chat_logprobs(client):
    done = _chat(client, logprobs=True, top_logprobs=3)
    tokens = done.choices[0].logprobs.content
    assert len(tokens) == 12
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-4)
    text = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
    assert text == done.choices[0].message.content


def reasoning(client):
    """The template opens the reasoning: all that a model says that never closes it is reasoning."""
    extra = {"chat_template_kwargs": {"thinking": True}}
    message = _chat(client, extra_body=extra).choices[0].message
    assert not message.content and message.reasoning_content == message.reasoning != ""
    deltas = [event.choices[0].delta for event in _chat(client, extra_body=extra, stream=True)]
    said = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert said == message.reasoning_content


def tools(client):
    """A call that is required has arguments of its schema, streamed or not, and its result goes back in."""
    asked = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200, "temperature": 1.0, "seed": 3}
    done = _chat(client, **asked)
    call, *_ = done.choices[0].message.tool_calls
    assert done.choices[0].finish_reason == "tool_calls" and call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
    deltas = [event.choices[0].delta for event in _chat(client, stream=True, **asked)]
    streamed = [part for delta in deltas for part in delta.tool_calls or ()]
    assert (
        "".join(part.function.arguments or "" for part in streamed if part.index == 0)
        == call.function.arguments
    )
    assert next(part.function.name for part in streamed) == "get_weather"
    turns = [
        {"role": "user", "content": "the weather?"},
        done.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "12.5"},
    ]
    after = client.chat.completions.create(
        model="tiny", messages=turns, tools=[TOOL], max_tokens=4, tool_choice="none"
    )
    assert after.usage.completion_tokens == 4 and not after.choices[0].message.tool_calls


def json_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        done = _chat(client, response_format=form, max_tokens=200, temperature=1.0, seed=seed)
        answer = json.loads(done.choices[0].message.content)
        assert set(answer) == {"high", "units"} and answer["units"] in ("celsius", "kelvin")
        assert isinstance(answer["high"], bool) and done.choices[0].finish_reason == "stop"


def errors(client):
    """Each mistake is the exception that OpenAI's client has for it, and says what is wrong."""
    cases = [
        (openai.NotFoundError, {"model": "other"}, "other"),
        (openai.BadRequestError, {"temperature": -1}, "temperature"),
        (openai.BadRequestError, {"max_tokens": 100_000}, "max_tokens"),
        (openai.BadRequestError, {"prompt": [999_999]}, "999999"),
        (openai.BadRequestError, {"logprobs": 21}, "logprobs"),
    ]
    for kind, options, words in cases:
        with pytest.raises(kind, match=words):
            _complete(client, **options)


def asynchronous(client):
    """Many at a time by the asynchronous client: each text is the one that it is alone."""
    texts = [f"{PROMPT} {i}" for i in range(6)]
    alone = [_complete(client, prompt=text).choices[0].text for text in texts]

    async def one(other, text):
        stream = await _complete(other, prompt=text, stream=True)
        return "".join([event.choices[0].text async for event in stream])

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as other:
            return await asyncio.gather(*(one(other, text) for text in texts))

    assert asyncio.run(all_at_once()) == alone


CHECKS = {
    check.__name__: check
    for check in (
        *(models, completion, completion_stream, many_prompts, echo_and_logprobs, seeds_and_n, stop),
        *(chat, chat_logprobs, reasoning, tools, json_schema, errors, asynchronous),
    )
}


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

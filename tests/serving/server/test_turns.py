"""Chats over an engine that says what the test wants: reasoning, tools, and what the template gets to see."""

import threading

import pytest

from tests.serving.answers import cut
from tests.serving.server.kit import TOKENIZER, Serving, parsed, scripted, until

CHAT = "/v1/chat/completions"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "é"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


@pytest.fixture(scope="module")
def server():
    with Serving(scripted()) as serving:
        yield serving


def answer(server, said: str, generator=None, **body):
    """(the engine's request, the response) of a chat in which the engine says this."""
    found = []
    asked = {"messages": [{"role": "user", "content": "the wind?"}], **body}
    thread = threading.Thread(target=lambda: found.append(server.post(CHAT, asked)))
    thread.start()
    (id,) = until(lambda: list(server.engine.requests))
    request = server.engine.requests[id]
    for token in cut(said, generator, TOKENIZER) if generator else TOKENIZER.encode(said, allow_special=True):
        server.engine.say(id, [token])
    server.engine.say(id, [TOKENIZER.eos_id], finish_reason="stop")
    thread.join()
    assert found[0].status_code == 200, found[0].text
    return request, found[0]


def streamed(response):
    """(fields of the deltas, joined; the finish reason)"""
    whole: dict = {}
    choices = [event["choices"][0] for event in parsed(response.text)[:-1]]
    for choice in choices:
        for name, value in choice["delta"].items():
            whole[name] = whole.get(name, type(value)()) + value
    return whole, choices[-1]["finish_reason"]


def test_reasoning_has_both_names():
    with Serving(scripted()) as server:
        said, switch = "the answer is 42</think>the wind", {"chat_template_kwargs": {"thinking": True}}
        request, response = answer(server, said, stop=["is"], **switch)
        message = response.json()["choices"][0]["message"]
        assert (message["content"], message["role"]) == ("the wind", "assistant")
        assert message["reasoning"] == message["reasoning_content"] == "the answer is 42"
        assert TOKENIZER.decode(request.prompt).endswith("<｜Assistant｜><think>")
        whole, reason = streamed(answer(server, said, stream=True, **switch)[1])
        assert whole == message and reason == "stop"
        _, response = answer(server, "the answer")
        assert "reasoning" not in response.json()["choices"][0]["message"]


def test_calls_of_tools(server):
    request, response = answer(server, "wait " + CALL, tools=[TOOL])
    (choice,) = response.json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"].strip() == "wait"
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "é"}'}
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert '"name": "get_weather"' in TOKENIZER.decode(request.prompt) and request.grammar is None
    whole, reason = streamed(answer(server, "wait " + CALL, tools=[TOOL], stream=True)[1])
    (part,) = whole["tool_calls"]
    assert reason == "tool_calls" and (part["index"], part["function"]) == (0, call["function"])
    # not wanted
    request, response = answer(server, CALL, tools=[TOOL], tool_choice="none")
    (choice,) = response.json()["choices"]
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"
    assert "get_weather" not in TOKENIZER.decode(request.prompt)


def test_a_call_that_must_come(server):
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        request, response = answer(server, CALL, tools=[TOOL], tool_choice=choice)
        assert response.json()["choices"][0]["finish_reason"] == "tool_calls"
        allowed = request.grammar.mask()
        first = TOKENIZER.id_of("<｜tool▁calls▁begin｜>")
        assert [i for i in range(TOKENIZER.vocab_size) if allowed[i // 32] >> (i % 32) & 1] == [first]


def test_earlier_turns_come_back(server):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "x"}'},
    }
    messages = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "wind?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12"},
    ]
    request, _ = answer(server, "ok", messages=messages, tools=[TOOL])
    prompt = TOKENIZER.decode(request.prompt)
    for part in (
        "short",
        "<｜User｜>the wind?",
        'get_weather<｜tool▁sep｜>{"city": "x"}',
        "12<｜tool▁output▁end｜>",
    ):
        assert part in prompt
    # the answer's room is what is left
    assert request.max_tokens == 256 - len(request.prompt)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
        ),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "what"}}}},
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages"),
    ],
)
def test_wrong_ones(server, body, param):
    response = server.post(CHAT, {"messages": [{"role": "user", "content": "x"}], **body})
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text

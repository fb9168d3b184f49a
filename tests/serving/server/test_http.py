"""The server's manners, over an engine that says what the test wants: refusals, keys, limits, streams that wait or fail."""

import json
import logging
import socket
import threading

import httpx
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from deepseek_jax.data.fim import fim_prompt
from deepseek_jax.serving.request import QueueFullError
from deepseek_jax.serving.server import leftover, schemas
from deepseek_jax.serving.server.admission import Admission
from deepseek_jax.serving.server.answer import event
from deepseek_jax.serving.server.errors import ApiError
from deepseek_jax.serving.server.fields import Fields
from deepseek_jax.serving.server.logs import JsonLines
from tests.serving.server.kit import TOKENIZER, Serving, parsed, scripted, until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    with Serving(scripted(), max_body=20_000, waiting=64, keep_alive=0.15) as serving:
        yield serving


@pytest.fixture
def asking(server):
    """Asks in a thread; gives (the engine's id of the request, where the response will be)."""
    threads = []

    def ask(path, body, **options):
        found, before = [], set(server.engine.requests)
        thread = threading.Thread(target=lambda: found.append(server.post(path, body, **options)))
        thread.start()
        threads.append(thread)
        return until(lambda: sorted(set(server.engine.requests) - before)), found

    yield ask
    for id in list(server.engine.requests):
        server.engine.abort(id)
    for thread in threads:
        thread.join()


def error_of(response) -> dict:
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": 3}, "prompt", "prompt=3 must be a string"),
        ({"prompt": []}, "prompt", "prompt=[] must be"),
        ({"prompt": [[]]}, None, "the prompt has no token"),
        ({"prompt": ["a", 1]}, "prompt", "must be a string, token ids"),
        ({"prompt": [1, True]}, "prompt", "must be a string, token ids"),
        ({"prompt": [1, 448]}, None, "token id 448 lies outside"),
        ({"prompt": [1, 10**30]}, None, "lies outside"),
        ({"prompt": "a" * 3000}, "prompt", "leaves no room for an answer: the model has max_model_len=256"),
        ({"prompt": "a", "max_tokens": 0.5}, "max_tokens", "max_tokens=0.5 must be an integer from 0"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "max_tokens=-1"),
        ({"prompt": "a", "max_tokens": "4"}, "max_tokens", "max_tokens='4'"),
        ({"prompt": "a", "max_tokens": 256}, "max_tokens", "no room for an answer of max_tokens=256"),
        ({"prompt": "a", "min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens=4"),
        ({"prompt": "a", "n": 0}, "n", "n=0 must be an integer from 1 to 128"),
        ({"prompt": "a", "n": True}, "n", "n=True"),
        ({"prompt": "a", "n": 67}, "n", "67 sequences of one request, its prompts times n"),
        ({"prompt": ["a"] * 67}, "prompt", "67 sequences of one request"),
        ({"prompt": "a", "best_of": 3}, "best_of", "best_of=3 must be n=1"),
        ({"prompt": [3], "suffix": "b"}, "suffix", "left out where the prompt is token ids"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "logprobs=21"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "logprobs=True"),
        ({"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs", "prompt_logprobs=-1"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "temperature=-0.1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "temperature='hot'"),
        ({"prompt": "a", "temperature": 10**400}, "temperature", "must be a number >= 0"),
        ({"prompt": "a", "top_p": 0}, "top_p", "top_p=0.0 must lie in (0, 1]"),
        ({"prompt": "a", "top_k": -2}, "top_k", "top_k=-2"),
        ({"prompt": "a", "min_p": 2}, "min_p", "min_p=2.0"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "repetition_penalty=0.0"),
        ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty", "presence_penalty=2.5"),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty", "frequency_penalty=-3"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids as its keys"),
        ({"prompt": "a", "logit_bias": {"7": 101}}, "logit_bias.7", "logit_bias.7=101"),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias", "token id 9999"),
        ({"prompt": "a", "seed": 1.5}, "seed", "seed=1.5"),
        ({"prompt": "a", "stop": ""}, "stop", "none of them empty"),
        ({"prompt": "a", "stop": [3]}, "stop", "stop=[3]"),
        ({"prompt": "a", "stop": ["x"] * 33}, "stop", "at most 32"),
        ({"prompt": "a", "stop_token_ids": [448]}, "stop_token_ids", "below vocab_size=448"),
        ({"prompt": "a", "stream": "yes"}, "stream", "true or false"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "left out unless stream is true"),
        ({"prompt": "a", "echo": 1}, "echo", "echo=1"),
        ({"prompt": "a", "cache_salt": 3}, "cache_salt", "cache_salt=3"),
        ({"prompt": "a", "priority": "high"}, "priority", "priority='high'"),
    ],
)
def test_wrong_completions(server, body, param, message):
    response = server.post(COMPLETIONS, body)
    error = error_of(response)
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert message in error["message"] and error["param"] == param, error
    assert not server.engine.requests and not server.service.running


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "a list of objects"),
        ({"messages": [{"content": "x"}]}, "messages", "it needs a role"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "messages", "it needs a role"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens", "max_tokens=0"),
        ({"messages": HI, "top_logprobs": 3}, "top_logprobs", "left out unless logprobs is true"),
        ({"messages": HI, "logprobs": 3}, "logprobs", "logprobs=3 must be true or false"),
        ({"messages": [{"role": "user", "content": "a" * 3000}]}, "messages", "leaves no room"),
        ({"messages": HI, "chat_template_kwargs": []}, "chat_template_kwargs", "must be an object"),
        ({"messages": HI, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "of its own"),
    ],
)
def test_wrong_chats(server, body, param, message):
    response = server.post(CHAT, body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not valid JSON"),
        (b"[]", "does not hold a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "not a finite number"),
        (b'{"prompt": "a", "prompt": "b"}', "stands there twice"),
        (b'{"prompt": "\\ud800"}', "not Unicode text"),
        (b'{"prompt": "\xff"}', "is not valid JSON"),
        (b"[" * 5000, "nested"),
        (b'{"prompt": "a", "x": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper than 32"),
    ],
)
def test_bodies_that_are_no_json_object(server, raw, message):
    response = server.client.post(COMPLETIONS, content=raw)
    assert response.status_code == 400 and message in error_of(response)["message"]


def test_what_is_not_there(server):
    for method, path, status in (
        ("GET", "/v1/nope", 404),
        ("GET", COMPLETIONS, 405),
        ("POST", "/health", 405),
    ):
        response = server.client.request(method, path)
        assert response.status_code == status and path in error_of(response)["message"]
    response = server.post(COMPLETIONS, {"prompt": "a", "model": "gpt"})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert server.client.get("/v1/models/tiny").json()["max_model_len"] == 256
    assert server.client.get("/v1/models/gpt").status_code == 404


def test_a_body_that_is_too_large(server):
    for content in (b"x" * 20_001, iter([b"x" * 10_000] * 3)):  # with and without a length
        response = server.client.post(COMPLETIONS, content=content)
        assert response.status_code == 413 and error_of(response)["code"] == "request_too_large"


def test_the_middle_of_a_text_is_asked_for_by_its_ends(asking, server):
    (id,), found = asking(COMPLETIONS, {"prompt": "the keys", "suffix": "values"})
    assert server.engine.requests[id].prompt == fim_prompt("the keys", "values", TOKENIZER)
    server.engine.say(id, TOKENIZER.encode("and the "), finish_reason="length")
    assert until(lambda: found)[0].json()["choices"][0]["text"] == "and the "


# --- fields that are not read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (COMPLETIONS, {"temprature": 0}, "temprature is no field; did you mean temperature?"),
        (COMPLETIONS, {"maxTokens": 4}, "maxTokens is no field; did you mean max_tokens?"),
        (COMPLETIONS, {"max_new_tokens": 4}, "did you mean max_tokens?"),
        (COMPLETIONS, {"repeat_penalty": 1.1}, "did you mean repetition_penalty?"),
        (CHAT, {"max_completion_token": 4}, "did you mean max_completion_tokens?"),
        (CHAT, {"tool": []}, "did you mean tools?"),
        (
            CHAT,
            {"stream": True, "stream_options": {"include_usages": True}},
            "stream_options.include_usages is no field; did you mean stream_options.include_usage?",
        ),
        (
            COMPLETIONS,
            {"use_beam_search": True},
            "use_beam_search=True is not done here: leave it out; False",
        ),
        (COMPLETIONS, {"bad_words": ["x"]}, "bad_words=['x'] is not done here: leave it out; [] would do"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions=[{'name': 'f'}] is not done here"),
        (CHAT, {"chat_template": "x"}, "chat_template='x' is not done here: leave it out"),
    ],
)
def test_slips_and_what_would_change_the_answer_are_refused(server, path, body, message):
    asked = {"messages": HI} if path == CHAT else {"prompt": "a"}
    error = error_of(server.post(path, asked | body))
    assert message in error["message"] and error["message"].startswith(error["param"]), error
    assert not server.engine.requests


def test_a_field_that_is_missing_may_have_another_name(server):
    for path, body, message in (
        (COMPLETIONS, {"promt": "a"}, "prompt is missing: there is promt, which is no field"),
        (CHAT, {"message": HI}, "messages is missing: there is message, which is no field"),
        ("/tokenize", {"promp": "a"}, "prompt is missing: there is promp"),
    ):
        assert message in error_of(server.post(path, body))["message"]


def test_fields_of_others_are_accepted_and_named(asking, server, caplog):
    """What no text depends on without a word."""
    silent = {"user": "me", "metadata": {"x": [1]}, "store": False, "stop": None, "nothing": None}
    neutral = {"use_beam_search": False, "bad_words": [], "length_penalty": 1.0, "skip_special_tokens": True}
    with caplog.at_level(logging.INFO, "deepseek_jax.serving"):
        for more, header in (
            ({}, None),
            ({"reasoning_effort": "high", "mi\nrostat\x85": 2}, r"reasoning_effort, 'mi\nrostat\x85'"),
        ):
            (id,), found = asking(COMPLETIONS, {"prompt": "a", **silent, **neutral, **more})
            server.engine.say(id, [70, 71], finish_reason="length")
            response = until(lambda found=found: found)[0]
            assert (response.status_code, response.headers.get("x-ignored-fields")) == (200, header)
        lines = until(lambda: len(caplog.records) >= 2 and caplog.records)
    assert [line.fields.get("ignored_fields") for line in lines] == [None, header]


def test_no_field_of_a_client_counts_as_a_slip():
    """Of OpenAI's own, those that we do not read; lm-eval, litellm, langchain and guidellm send no others but vLLM's."""
    for read, params in (
        (schemas.chat, chat_params.CompletionCreateParamsBase),
        (schemas.completion, completion_params.CompletionCreateParamsBase),
    ):
        fields = Fields({"prompt": "a", "messages": HI})
        read(fields)
        for name in (*params.__annotations__, *leftover.MATTER, *leftover.NO_MATTER):
            neutral = leftover.MATTER.get(name, ("x",))
            if name not in fields.read and neutral:
                other = Fields({name: neutral[0]})
                other.read = fields.read
                assert leftover.ignored(other) in ((), (name,))


def test_a_letter_too_few_or_two_exchanged_are_a_slip():
    for read in (schemas.chat, schemas.completion):
        fields = Fields({"prompt": "a", "messages": HI})
        read(fields)
        for name in fields.read:
            for i in range(len(name) - 1) if len(name) > 4 else ():
                for slip in (name[:i] + name[i + 1 :], name[:i] + name[i + 1] + name[i] + name[i + 2 :]):
                    wrong = Fields({slip: 1})
                    wrong.read = fields.read
                    if slip not in {*fields.read, *leftover.MATTER}:
                        with pytest.raises(ApiError, match="did you mean"):
                            leftover.ignored(wrong)


def test_the_key():
    with Serving(scripted(), api_key="sesame") as server:
        for given in ({}, {"authorization": "Bearer no"}, {"authorization": "sesame"}):
            response = server.client.get("/v1/models", headers=given)
            assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 401
        good = server.client.get("/v1/models", headers={"authorization": "Bearer sesame"})
        assert good.status_code == 200
        for path in ("/", "/health", "/livez", "/readyz", "/metrics", "/version"):
            assert server.client.get(path).status_code == 200


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_full_queue(asking):
    with Serving(scripted(rows=1), waiting=1, waiting_tokens=12) as server:
        first, second = (threading.Thread(target=server.complete, args=("a",)) for _ in range(2))
        for thread, count in ((first, 1), (second, 2)):
            thread.start()
            until(lambda count=count: len(server.engine.requests) == count)
        response = server.post(COMPLETIONS, {"prompt": "a"})
        error = error_of(response)
        assert (response.status_code, error["code"]) == (429, "queue_full")
        seconds, milliseconds = (int(response.headers[name]) for name in ("retry-after", "retry-after-ms"))
        assert 1 <= seconds <= 60 and 500 <= milliseconds <= 60_000
        # the first token of one makes room for another, but not for a long one
        id, other = server.engine.requests
        server.engine.say(id, [70])
        until(lambda: server.service.admission.waiting == 1)
        assert server.post(COMPLETIONS, {"prompt": [5] * 12}).status_code == 429
        for running in (id, other):
            server.engine.say(running, [70], finish_reason="stop")
        first.join(), second.join()
        assert (server.service.admission.waiting, server.service.admission.waiting_tokens) == (0, 0)


def test_admission_counts_what_comes_and_goes():
    admission = Admission(4, 100)
    admission.enter(3, 90)
    with pytest.raises(QueueFullError, match="3 sequences with 90 prompt tokens wait"):
        admission.enter(1, 11)
    admission.enter(1, 10)
    with pytest.raises(QueueFullError):
        admission.enter(1, 0)
    for _ in range(4):
        admission.leave(25, started=True)
    assert (admission.waiting, admission.waiting_tokens) == (0, 0)
    admission.enter(1, 1000)  # alone it always may


def test_what_the_engine_refuses_has_its_status(asking, server):
    for error, status, word in (
        (ValueError("prompt of 9 tokens + max_tokens=9 take 3 pages"), 400, "take 3 pages"),
        (QueueFullError("2 requests wait already", 3.0), 429, "wait already"),
        (RuntimeError("boom"), 500, "internal error"),
    ):
        for stream in (False, True):
            (id, _), found = asking(COMPLETIONS, {"prompt": "a", "stream": stream, "n": 2})
            server.engine.refuse(id, error)
            response = until(lambda found=found: found)[0]
            assert response.status_code == status and word in error_of(response)["message"]
    until(lambda: not server.service.running)
    assert server.service.admission.waiting == 0


def test_what_is_refused_is_no_request_that_ended(asking):
    """At first sight, by the engine, or because the queue is full: it is counted nowhere, as by vLLM."""
    with Serving(scripted(rows=1), waiting=1) as server:
        ended = lambda: {  # noqa: E731
            name: value
            for name, value in server.metrics().items()
            if name in ("vllm:request_success_total", "vllm:e2e_request_latency_seconds_count")
        }
        assert server.post(COMPLETIONS, {"prompt": "a", "temperature": -1}).status_code == 400
        threads = [
            threading.Thread(target=server.post, args=(COMPLETIONS, {"prompt": "a"})) for _ in range(2)
        ]
        for count, thread in enumerate(threads, 1):
            thread.start()
            ids = until(
                lambda count=count: len(server.engine.requests) == count and list(server.engine.requests)
            )
        assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 429
        server.engine.refuse(ids[0], ValueError("prompt of 9 tokens takes 3 pages"))
        threads[0].join()
        assert not any(ended().values())
        server.engine.say(ids[1], [70], finish_reason="stop")
        threads[1].join()
        assert set(ended().values()) == {1}


def test_what_nobody_expected_is_said_and_logged(server, caplog, monkeypatch):
    def submit(*_):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(server.engine, "submit", submit)
    monkeypatch.setattr(logging.getLogger("deepseek_jax.serving"), "propagate", True)
    response = server.post(COMPLETIONS, {"prompt": "a"})
    assert response.status_code == 500 and error_of(response)["message"] == "internal error: TypeError"
    trace = json.loads(JsonLines().format(until(lambda: caplog.records)[0]))["trace"]
    assert "TypeError: a mistake of ours" in trace
    assert server.service.admission.waiting == 0 and not server.service.running


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_chat_is_streamed_as_openai_does(asking, server):
    ids = TOKENIZER.encode("the keys ±") + TOKENIZER.encode(" é")
    (id,), found = asking(CHAT, {"messages": HI, "stream": True, "logprobs": True, "top_logprobs": 1})
    for token in ids:
        server.engine.say(id, [token])
    server.engine.say(id, [TOKENIZER.eos_id], finish_reason="stop")
    *events, done = parsed(until(lambda: found)[0].text)
    choices = [event["choices"][0] for event in events]
    assert done == "[DONE]" and {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "the keys ± é"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert b"".join(bytes(entry["bytes"]) for entry in entries[:-1]).decode() == "the keys ± é"
    assert all(entry["logprob"] == -1.0 for entry in entries) and len(entries) == len(ids) + 1


def test_a_stream_that_waits_says_that_it_lives(server, asking):
    (id,), found = asking(COMPLETIONS, {"prompt": "a", "stream": True})
    until(lambda: server.service.running)
    threading.Event().wait(0.5)
    server.engine.say(id, TOKENIZER.encode("x"), finish_reason="length")
    text = until(lambda: found)[0].text
    assert 2 <= text.count(": keep-alive\n\n") <= 4
    assert parsed(text)[0]["choices"][0]["text"] == "x"


def test_an_error_after_the_first_event_ends_the_stream(server, asking):
    (id,), found = asking(CHAT, {"messages": HI, "stream": True})
    server.engine.say(id, TOKENIZER.encode("the"))
    until(lambda: server.service.running and next(iter(server.service.running)).samples[0].first)
    threading.Event().wait(0.05)
    server.engine.say(id, finish_reason="error", error="the engine failed: out of memory")
    *events, last = parsed(until(lambda: found)[0].text)
    assert "out of memory" in last["error"]["message"] and last["error"]["type"] == "server_error"
    assert events[-1]["choices"][0]["delta"] == {"content": "the"}
    (id,), found = asking(CHAT, {"messages": HI})
    server.engine.say(id, TOKENIZER.encode("the"))
    server.engine.say(id, finish_reason="error", error="the engine failed: out of memory")
    assert until(lambda: found)[0].status_code == 500


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_a_client_that_leaves_ends_its_request(server, stream, started):
    body = json.dumps({"prompt": "a", "n": 2, "stream": stream}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + body)
        ids = until(lambda: len(server.engine.requests) == 2 and list(server.engine.requests))
        if started:
            server.engine.say(ids[0], [70])
    until(lambda: not server.engine.requests)
    assert {(id, "abort") for id in ids} <= set(server.engine.aborted)
    until(lambda: not server.service.running and not server.service.requests)
    assert server.service.admission.waiting == 0


# --- life -----------------------------------------------------------------------------------------------------------


def test_before_it_is_ready_and_while_it_stops():
    with Serving(None) as server:
        assert [server.client.get(path).status_code for path in ("/livez", "/health", "/readyz")] == [
            200,
            200,
            503,
        ]
        response = server.post(COMPLETIONS, {"prompt": "a"})
        assert response.status_code == 503 and response.headers["retry-after"] == "5"
        server.what = scripted()
        server.service.begin(server.what)
        assert server.client.get("/readyz").text == "ready\n"
        server.service.drain()
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/livez").status_code == 200
        assert "stopping" in error_of(server.post(CHAT, {"messages": HI}))["message"]


def test_a_failed_engine():
    with Serving(scripted()) as server:
        server.engine.failed = RuntimeError("boom")
        for path in ("/livez", "/health", "/readyz", "/v1/models"):
            assert server.client.get(path).status_code == 503


def test_ids_of_requests_and_the_log(server, asking, caplog):
    with caplog.at_level(logging.INFO, "deepseek_jax.serving"):
        (id,), found = asking(COMPLETIONS, {"prompt": "the keys"}, headers={"x-request-id": "mine-1"})
        server.engine.say(id, [70, 71], finish_reason="length")
        response = until(lambda: found)[0]
        made = server.client.get("/v1/models", headers={"x-request-id": "not one\x7f"}).headers[
            "x-request-id"
        ]
        until(lambda: len(caplog.records) >= 2)
    assert response.headers["x-request-id"] == "mine-1" and len(made) == 32
    line = json.loads(JsonLines().format(caplog.records[0]))
    assert line["event"] == "request" and line["level"] == "info"
    wanted = {"request_id": "mine-1", "path": COMPLETIONS, "status": 200, "completion_tokens": 2}
    assert {name: line[name] for name in wanted} == wanted
    assert line["id"] == response.json()["id"] and line["finish_reasons"] == ["length"]


# --- tokenizer and page ---------------------------------------------------------------------------------------------


def test_the_tokenizer_for_those_who_have_none(server):
    text = "the keys ± "
    ids = server.ask("/tokenize", {"prompt": text})
    assert ids["tokens"] == TOKENIZER.encode_prompt(text) and ids["count"] == len(ids["tokens"])
    assert ids["max_model_len"] == 256
    plain = server.ask("/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True})
    assert "".join(TOKENIZER.decode([i]) for i in plain["tokens"][:1]) == plain["token_strs"][0]
    assert server.ask("/detokenize", {"tokens": plain["tokens"]})["prompt"] == text
    chat = server.ask("/tokenize", {"messages": HI})["tokens"]
    assert chat == TOKENIZER.encode_chat(HI)
    info = server.client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<｜end▁of▁sentence｜>" and "<｜Assistant｜>" in info["chat_template"]
    assert error_of(server.post("/detokenize", {"tokens": [448]}))["param"] == "tokens"
    assert error_of(server.post("/tokenize", {}))["param"] == "prompt"


def test_the_page_comes_with_the_server(server):
    page = server.client.get("/")
    assert page.status_code == 200 and "<!doctype html>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_body_that_never_comes_whole(server):
    """It holds nothing in the engine."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{".encode())
        until(lambda: server.service.requests == 1)
    until(lambda: server.service.requests == 0)
    assert httpx.get(f"http://127.0.0.1:{server.port}/health").status_code == 200


def test_an_event_is_one_line_however_a_client_cuts_lines():
    text = "".join(map(chr, range(0x2100))) + "\ud800"  # every end of a line among them
    line, empty = event({"text": text}).decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text} and empty == ""

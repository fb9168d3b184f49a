"""The server over a real engine: what goes in, what comes out, whole and streamed; and the command that starts it."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import threading

import httpx
import pytest
from absl.testing import flagsaver

from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import Sampling
from deepseek_jax.serving.server import running
from experiments import command_line, serve
from tests.serving import openai_client
from tests.serving.server.kit import CFG, TOKENIZER, Serving, closing, directly, folder, real, scripted, until

TEXT = "the keys and the values"


@pytest.fixture(scope="module")
def server():
    with closing(real()) as what, Serving(what) as serving:
        yield serving


def alone(server, prompt, tokens=8, sampling=None, **options):
    """Tokens of a prompt, from the engine without a server; and the tokens of the prompt."""
    ids = TOKENIZER.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    stops = options.pop("stop_ids", TOKENIZER.stop_ids)
    request = Request("alone", ids, tokens, sampling or Sampling(), stop_ids=stops, **options)
    return directly(server.engine, request)


def text_of(tokens) -> str:
    return TOKENIZER.decode([token.id for token in tokens], skip_special=True)


def texts(answer) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def test_every_form_of_prompt(server):
    other = "def get_weather(city)"
    want, more = (text_of(alone(server, prompt)[0]) for prompt in (TEXT, other))
    ids, other_ids = TOKENIZER.encode_prompt(TEXT), TOKENIZER.encode_prompt(other)
    for prompt, answers in (
        (TEXT, [want]),
        ([TEXT, other], [want, more]),
        (ids, [want]),
        ([other_ids, ids], [more, want]),
    ):
        answer = server.complete(prompt, max_tokens=8)
        assert texts(answer) == answers
    usage, count = answer["usage"], len(ids) + len(other_ids)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (count, 16)
    hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
    assert hit + miss == count and usage["prompt_tokens_details"]["cached_tokens"] == hit
    assert server.complete(TEXT)["usage"]["completion_tokens"] == 16  # OpenAI's default
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"


def test_a_prompt_that_was_there_before_is_found_in_the_cache(server):
    ids = [7 + i % 90 for i in range(150)]
    fresh, again, salted = (server.complete(ids, max_tokens=2, cache_salt=salt) for salt in ("a", "a", "b"))
    assert [x["usage"]["prompt_cache_hit_tokens"] for x in (fresh, again, salted)] == [0, 128, 0]
    assert texts(fresh) == texts(again) == texts(salted)


def test_samples_have_seeds_of_their_own_and_the_same_seed_the_same_text(server):
    hot = {"temperature": 1.5, "max_tokens": 8, "seed": 11}
    answer = server.complete([TEXT, "x"], n=3, **hot)
    assert len(set(texts(answer)[:3])) == 3
    for j in range(3):
        tokens, _ = alone(server, TEXT, sampling=Sampling(temperature=1.5), seed=11 + j)
        assert texts(answer)[j] == text_of(tokens)
    assert answer["usage"]["prompt_tokens"] == len(TOKENIZER.encode_prompt(TEXT)) + 1
    assert answer["usage"]["completion_tokens"] == 48
    unseeded = {texts(server.complete(TEXT, **hot | {"seed": None}))[0] for _ in range(3)}
    assert len(unseeded) > 1


def test_echo_with_log_probabilities(server):
    tokens, prompt = alone(server, TEXT, tokens=4, logprobs=2, prompt_logprobs=2)
    (choice,) = server.complete(TEXT, max_tokens=4, logprobs=2, echo=True)["choices"]
    found = choice["logprobs"]
    assert choice["text"] == TEXT + text_of(tokens)
    assert found["token_logprobs"] == [token.logprob for token in (*prompt, *tokens)]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["tokens"][: len(prompt)] == [TOKENIZER.token(token.id) for token in prompt]
    for at, token, top in zip(found["text_offset"], found["tokens"], found["top_logprobs"], strict=True):
        assert token.startswith("bytes:") or choice["text"][at:].startswith(token)
        assert top is None or (token in top and 2 <= len(top) <= 3)
    # without an answer: scoring
    (scored,) = server.complete(TEXT, max_tokens=0, logprobs=2, echo=True)["choices"]
    assert scored["text"] == TEXT and scored["finish_reason"] == "length"
    assert scored["logprobs"]["token_logprobs"] == found["token_logprobs"][: len(prompt)]
    (named,) = server.complete(TEXT, max_tokens=1, logprobs=0, return_tokens_as_token_ids=True)["choices"]
    assert named["logprobs"]["tokens"] == [f"token_id:{tokens[0].id}"]
    assert list(named["logprobs"]["top_logprobs"][0].values()) == [tokens[0].logprob]


def test_prompt_logprobs_and_ids(server):
    tokens, prompt = alone(server, TEXT, tokens=2, prompt_logprobs=1)
    (choice,) = server.complete(TEXT, max_tokens=2, prompt_logprobs=1, return_token_ids=True)["choices"]
    assert choice["token_ids"] == [token.id for token in tokens]
    assert choice["prompt_token_ids"] == [token.id for token in prompt]
    assert choice["prompt_logprobs"][0] is None
    for found, token in zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True):
        assert found[str(token.id)]["logprob"] == token.logprob
        assert {int(i) for i in found} == {token.id, token.top[0][0]}


def test_a_stop_string_ends_the_request_in_the_engine(server):
    whole = server.complete(TEXT, max_tokens=40)["choices"][0]["text"]
    stop = next(whole[i : i + 3] for i in range(8, 30) if whole[i : i + 3].isascii())
    before = server.metrics()["vllm:request_success_total"]
    answer = server.complete(TEXT, max_tokens=200, stop=["not there", stop])
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    assert answer["usage"]["completion_tokens"] <= 40
    until(lambda: not server.engine.engine.has_work)
    assert server.metrics()["vllm:request_success_total"] == before + 1


def test_what_is_said_of_sampling_reaches_the_engine(server):
    eos, x = TOKENIZER.eos_id, TOKENIZER.encode("x")[0]

    def answered(**body):
        answer = server.complete(TEXT, max_tokens=5, return_token_ids=True, **body)
        return answer["choices"][0]["token_ids"], answer["choices"][0]["finish_reason"]

    assert answered(logit_bias={str(x): 100}) == ([x] * 5, "length")
    assert answered(logit_bias={str(eos): 100}) == ([eos], "stop")
    assert answered(logit_bias={str(eos): 100}, ignore_eos=True) == ([eos] * 5, "length")
    assert answered(logit_bias={str(x): 100}, stop_token_ids=[x]) == ([x], "stop")
    ids, reason = answered(logit_bias={str(eos): 100}, min_tokens=3)
    assert (len(ids), ids[-1], eos in ids[:-1], reason) == (4, eos, False, "stop")
    assert answered(
        logit_bias={str(x): 5}, temperature=0.7, top_k=1, min_p=0.1, top_p=0.5, seed=1
    ) == answered(logit_bias={str(x): 5})
    sampling = Sampling(
        temperature=0.9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.5, top_k=50
    )
    tokens, _ = alone(server, TEXT, tokens=5, sampling=sampling, seed=4)
    body = {
        name: getattr(sampling, name)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    }
    assert answered(temperature=0.9, top_k=50, seed=4, **body)[0] == [token.id for token in tokens]


def test_the_text_of_a_stop_id_is_left_out(server):
    x = TOKENIZER.encode("x")[0]
    (choice,) = server.complete(TEXT, logit_bias={str(x): 100}, stop_token_ids=[x])["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_a_stream_says_what_the_whole_says(server):
    body = {
        "prompt": [TEXT, "x"],
        "n": 2,
        "max_tokens": 12,
        "temperature": 1.1,
        "seed": 3,
        "logprobs": 1,
        "echo": True,
    }
    whole = server.ask("/v1/completions", body)
    *events, usage, done = server.events(
        "/v1/completions", body | {"stream_options": {"include_usage": True}}
    )
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 48
    assert {event["id"] for event in events} == {usage["id"]} and len({e["created"] for e in events}) == 1
    assert all(event["usage"] is None for event in events)
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + ["length"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [x for part in mine for x in part["logprobs"][name]] == choice["logprobs"][name]
    assert len(events) > len(whole["choices"])


def test_usage_in_every_event(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": TEXT, "max_tokens": 6, "temperature": 0, "stream_options": options}
    *events, usage, _ = server.events("/v1/completions", body)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == usage["usage"]["completion_tokens"] == 6


def test_ids_do_not_wait_for_whole_characters():
    first, *rest = TOKENIZER.encode("木")
    body = {"prompt": TEXT, "max_tokens": 3, "stream": True, "return_token_ids": True}
    with Serving(scripted()) as server:

        def begin():
            (id,) = until(lambda: list(server.engine.requests))
            server.engine.say(id, [first])

        thread = threading.Thread(target=begin)
        thread.start()
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            events = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
            (choice,) = next(events)["choices"]
            assert (choice["token_ids"], choice["text"]) == ([first], "")
            server.engine.say(next(iter(server.engine.requests)), rest, finish_reason="length")
            (choice,) = next(events)["choices"]
            assert (choice["token_ids"], choice["text"], choice["finish_reason"]) == (rest, "木", "length")
        thread.join()


def test_metrics_are_what_the_client_counts(server):
    before = server.metrics()
    answers = [server.complete(TEXT, max_tokens=i, n=1 + i % 2, stop="e") for i in range(1, 8)]
    made = {name: value - before.get(name, 0) for name, value in server.metrics().items()}
    for name, field in (("prompt_tokens", "prompt_tokens"), ("generation_tokens", "completion_tokens")):
        assert made[f"vllm:{name}_total"] == sum(answer["usage"][field] for answer in answers)
    choices = sum(len(answer["choices"]) for answer in answers)
    tokens = made["vllm:generation_tokens_total"]
    assert made["vllm:request_success_total"] == choices
    assert made["vllm:time_to_first_token_seconds_count"] == choices
    assert made["vllm:request_queue_time_seconds_count"] == choices
    assert made["vllm:e2e_request_latency_seconds_count"] == choices
    assert made["vllm:inter_token_latency_seconds_count"] == tokens - choices
    until(lambda: not server.engine.engine.has_work)
    now = server.metrics()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert now[f"vllm:{name}"] == 0
    assert now["vllm:cache_config_info"] == 1


# --- chats and forms ------------------------------------------------------------------------------------------------


def test_a_chat_goes_through_the_template_and_streams_what_it_says(server):
    ids = TOKENIZER.encode_chat([{"role": "user", "content": "the wind?"}])
    tokens, _ = alone(server, ids, tokens=10, logprobs=2)
    answer = server.chat("the wind?", max_tokens=10, logprobs=True, top_logprobs=2)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text_of(tokens)}
    assert answer["usage"]["prompt_tokens"] == len(ids) and answer["object"] == "chat.completion"
    entries = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [token.logprob for token in tokens]
    assert all(
        [top["logprob"] for top in e["top_logprobs"]] == sorted((x for _, x in t.top), reverse=True)
        for e, t in zip(entries, tokens, strict=True)
    )
    body = {"messages": [{"role": "user", "content": "the wind?"}], "temperature": 0, "max_tokens": 10}
    *events, _ = server.events("/v1/chat/completions", body)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == text_of(tokens)
    rest = server.chat("the wind?", logit_bias={str(TOKENIZER.encode("x")[0]): 100})
    assert rest["usage"]["total_tokens"] == CFG.max_position_embeddings
    assert rest["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("schema", [{"enum": ["keys", "values"]}, {"type": "boolean"}])
def test_an_answer_has_the_form_that_was_asked_for(server, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(3):
        hot = {"temperature": 2.0, "seed": seed, "max_tokens": 100, "response_format": form}
        (choice,) = server.chat("the wind?", **hot)["choices"]
        found = json.loads(choice["message"]["content"])
        assert found in schema.get("enum", [True, False]) and choice["finish_reason"] == "stop"
        assert json.loads(server.complete(TEXT, **hot)["choices"][0]["text"]) is not None


def test_a_call_is_written_because_it_must(server):
    parameters = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": parameters | {"additionalProperties": False}},
    }
    blanks = [i for i in range(TOKENIZER.vocab_size) if not TOKENIZER.token(i).strip()]
    bias = {str(i): -100 for i in blanks}  # a random model would write little else between the words
    answer = server.chat(
        "x", tools=[tool], tool_choice="required", parallel_tool_calls=False, logit_bias=bias
    )
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["n"] in (1, 2) and call["function"]["name"] == "f"
    assert choice["finish_reason"] == "tool_calls"


def test_many_clients_at_once_and_those_that_leave(server):
    """More requests than rows, each with its own answer; half of the clients leave, and nothing is left behind."""
    bodies = [{"prompt": [9 + i] * (3 + 7 * i), "max_tokens": 6 + i, "temperature": 0} for i in range(8)]
    want = [server.ask("/v1/completions", body)["choices"][0]["text"] for body in bodies]

    async def ask(client, i, leaves):
        if not leaves:
            return (await client.post("/v1/completions", json=bodies[i])).json()["choices"][0]["text"]
        body = bodies[i] | {"stream": i % 4 < 2, "max_tokens": 150}
        with contextlib.suppress(httpx.TimeoutException):
            await client.post("/v1/completions", json=body, timeout=0.02 * (1 + i % 3))
        return None

    async def all_of_them():
        async with httpx.AsyncClient(base_url=str(server.client.base_url), timeout=60) as client:
            return await asyncio.gather(*(ask(client, i % 8, i % 2 == 1) for i in range(32)))

    found = asyncio.run(all_of_them())
    assert [text for text in found if text is not None] == [want[i % 8] for i in range(0, 32, 2)]
    until(lambda: not server.engine.engine.has_work and not server.service.running)
    (scheduler,) = server.engine.engine.schedulers
    assert scheduler.pool.held == 0 and not scheduler.running and not scheduler.waiting
    assert server.service.admission.waiting == server.service.admission.waiting_tokens == 0


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command():
    """The flags are as they were, and so are the loggers."""
    saved = flagsaver.save_flag_values(serve.FLAGS)
    loggers = [logging.getLogger(name) for name in ("deepseek_jax.serving", "uvicorn")]
    states = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield lambda *flags: command_line.status(serve.main, flags)
    flagsaver.restore_flag_values(saved, serve.FLAGS)
    for logger, handlers, propagate, level in states:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_the_command(server, command, capsys):
    want = server.complete(TEXT, max_tokens=8)["choices"][0]["text"]
    with running.listening("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    got = []

    def client():
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"authorization": "Bearer s"}
        ) as client:
            until(lambda: status_of(client) == 200, 60)
            body = {"prompt": TEXT, "max_tokens": 8, "temperature": 0, "model": "small"}
            got.append(client.post("/v1/completions", json=body).json())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=client)
    thread.start()
    sizes = ("--rows=2", "--chunk=64", "--pages=24", "--drafts=off")
    try:
        assert command(f"--checkpoint={folder().name}/small", f"--port={port}", "--api_key=s", *sizes) == 0
    finally:
        thread.join()
    assert got[0]["choices"][0]["text"] == want
    out, err = capsys.readouterr()
    assert f"small is ready: open http://127.0.0.1:{port}/ in a browser" in out and "curl" in out
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines] == ["request", "stopping", "stopped"]
    assert lines[0]["completion_tokens"] == 8


def status_of(client) -> int:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/readyz").status_code
    return 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--checkpoint"),
        (("--checkpoint=/nonexistent", "--port=0"), "/nonexistent does not exist"),
        (("--checkpoint=/nonexistent", "--port=0", "--rows=0"), "rows"),
        (("--checkpoint=/nonexistent", "--port=0", "--served_model_name="), "name is empty"),
        (
            ("--checkpoint=/nonexistent", "--port=0", "--host=nowhere.invalid"),
            "cannot listen at nowhere.invalid",
        ),
        (("--checkpoint=/nonexistent", "--port=0", "--kv_events=tcp:/x"), "KV events cannot go to 'tcp:/x'"),
    ],
)
def test_mistakes_on_the_command_line(command, flags, message, capsys):
    assert command(*flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


# The others, and other clients: python -m tests.serving.clients
@pytest.mark.parametrize(
    "name", ("models", "completion_stream", "seeds_and_n", "stop", "chat_logprobs", "errors")
)
def test_an_openai_client_that_knows_nothing_of_this_server(server, name):
    with openai_client.client_of(f"http://127.0.0.1:{server.port}") as client:
        openai_client.CHECKS[name](client)

"""Requests that are wrong in every way, by hand: none may end in a 500, in a broken answer, or in the server's end.

    python -m tests.serving.fuzz --requests=10000 --seed=0

A request is a good one with some fields gone, of another type or out of range; or JSON cut or changed in a byte; or no HTTP
at all. What is answered otherwise than 200 must say why in OpenAI's form. At the end nothing is left behind.
"""

import argparse
import asyncio
import collections
import copy
import functools
import json
import random
from typing import Any

import httpx

from tests.serving.crowd import at_most, client, events_of
from tests.serving.openai_client import SCHEMA, TOOL
from tests.serving.running import quiet, running

EXPECTED = {200, 400, 404, 405, 413, 429}
COMPLETION = {"model": "tiny", "prompt": "the keys", "max_tokens": 3}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the wind?"}], "max_tokens": 3}
GOOD = (
    ("/v1/completions", COMPLETION),
    ("/v1/completions", COMPLETION | {"prompt": [[5, 6], [7]], "n": 2, "logprobs": 2, "echo": True}),
    (
        "/v1/completions",
        COMPLETION | {"stream": True, "stream_options": {"include_usage": True}, "stop": ["e"]},
    ),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", CHAT | {"tools": [TOOL], "tool_choice": "auto", "seed": 1}),
    ("/v1/chat/completions", CHAT | {"tools": [TOOL], "tool_choice": "required"}),
    (
        "/v1/chat/completions",
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    ),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}),
    ("/tokenize", {"prompt": "the keys", "return_token_strs": True}),
    ("/tokenize", {"messages": CHAT["messages"]}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
)
FIELDS = (
    *[
        "model",
        "prompt",
        "max_tokens",
        "n",
        "logprobs",
        "echo",
        "stream",
        "stream_options",
        "stop",
        "messages",
        "tools",
        "tool_choice",
        "seed",
    ],
    *[
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
    ],
    *[
        "min_tokens",
        "stop_token_ids",
        "ignore_eos",
        "prompt_logprobs",
        "suffix",
        "best_of",
        "user",
        "response_format",
    ],
    *[
        "top_logprobs",
        "max_completion_tokens",
        "chat_template_kwargs",
        "cache_salt",
        "priority",
        "return_token_ids",
        "tokens",
    ],
)
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 21, 128, 1e308, -1e-320, 0.5, 2**31, 2**63, 2**64, -(2**63), 10**400),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "0",
        "null",
        "\x00",
        "\ud800",
        "\U0001f9a9" * 9,
        "ß" * 5000,
        "<think>",
    ),
    *(
        "<｜tool▁calls▁begin｜>",
        "{{ messages }}",
        [],
        [[]],
        [None],
        [""],
        [0],
        [-1],
        [10**9],
        [[5], "a"],
        ["a"] * 40,
    ),
    *(
        {},
        {"": {}},
        {"5": 1},
        {"5": "x"},
        {"type": "json_schema"},
        {"type": "function", "function": {"name": "x"}},
    ),
    *({"type": "json_schema", "json_schema": {"schema": {"$ref": "#/a"}}}, [{"role": "tool"}], [{"role": 3}]),
    *([{"role": "user", "content": [{"type": "image_url"}]}], {"include_usage": "yes"}, [1.0], 3.0, [True]),
)
# No HTTP, or none that is served.
RAW = (
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    b"GET /v1/models/%ff%00..%2f HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\xfe\r\n\r\n",
)


def request(draw: random.Random) -> tuple[str, bytes]:
    """A path, and a body that may be no JSON."""
    path, good = draw.choice(GOOD)
    body = copy.deepcopy(good)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        mutate(draw, body)
    raw = json.dumps(body).encode()
    if draw.random() < 0.1:
        at = draw.randrange(len(raw))
        raw = draw.choice(
            (raw[:at], raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :], raw * 2, b"[" * 100_000)
        )
    return path, raw


def mutate(draw: random.Random, body: dict[str, Any]) -> None:
    """Changes, removes or adds one field, anywhere in the body."""
    places: list[tuple[Any, Any]] = [(body, draw.choice(FIELDS))] * 4
    stack: list[Any] = [body]
    while stack:
        inner = stack.pop()
        if isinstance(inner, dict | list):
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            places += [(inner, key) for key in keys]
            stack += [inner[key] for key in keys]
    holder, key = draw.choice(places)
    if draw.random() < 0.15 and isinstance(holder, dict):
        holder.pop(key, None)
    else:
        holder[key] = copy.deepcopy(draw.choice(STRANGE))


async def ask(http: httpx.AsyncClient, counts: collections.Counter, seed: int) -> None:
    draw = random.Random(seed)
    path, raw = request(draw)
    headers = {"Content-Type": draw.choice(("application/json", "text/plain"))}
    try:
        async with http.stream("POST", path, content=raw, headers=headers) as response:
            await check(response)
            counts[response.status_code] += 1
    except (AssertionError, ValueError, KeyError, httpx.HTTPError) as error:
        raise AssertionError(
            f"seed {seed}: {type(error).__name__}: {error}\nPOST {path} {raw[:2000]!r}"
        ) from error


async def check(response: httpx.Response) -> None:
    """Raises AssertionError, ValueError or KeyError for an answer that OpenAI's API would not give."""
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        events = [data async for data in events_of(response)]
        assert events[-1] == "[DONE]" and all("error" not in json.loads(data) for data in events[:-1]), (
            events[-1]
        )
        return
    body = (await response.aread()).decode()
    assert response.status_code in EXPECTED, f"{response.status_code}: {body[:500]}"
    value = json.loads(body, parse_constant=lambda name: 1 / 0)
    if response.status_code != 200:
        error = value["error"]
        assert error["message"] and error["type"] and "\n" not in error["message"], body


async def ask_raw(port: int, counts: collections.Counter, seed: int) -> None:
    raw = random.Random(seed).choice(RAW)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    try:
        status = (await asyncio.wait_for(reader.readline(), 0.5)).split()
    except (TimeoutError, ConnectionError, ValueError):
        status = []  # it waits for the rest, or has hung up
    writer.close()
    code = int(status[1]) if len(status) > 1 else 0
    assert code < 500, f"{raw[:100]!r} was answered {code}"
    counts[f"raw {code or 'none'}"] += 1


async def fuzz(server: Any, requests: int, seed: int, many: int) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    async with client(server.url) as http:
        jobs = []
        for i in range(seed * 1_000_003, seed * 1_000_003 + requests):
            raw = i % 20 == 0
            jobs.append(
                functools.partial(ask_raw, server.port, counts, i)
                if raw
                else functools.partial(ask, http, counts, i)
            )
        await at_most(many, jobs)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--many", type=int, default=32, help="at a time")
    args = parser.parse_args()
    with running(rows=8, waiting=1000) as (server, _):
        before = server.resident()
        counts = asyncio.run(fuzz(server, args.requests, args.seed, args.many))
        quiet(server)
        assert server.process.poll() is None and "Traceback" not in server.log.read_text()
        grown = (server.resident() - before) / 2**20
    print(
        f"{args.requests} requests, none a 500: {dict(sorted(counts.items(), key=str))}; memory {grown:+.0f} MiB"
    )


if __name__ == "__main__":
    main()

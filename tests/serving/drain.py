"""SIGTERM under load, by hand: every request that was accepted is answered whole, no new one is, and the status is 0.

python -m tests.serving.drain --requests=40 --times=3
"""

import argparse
import asyncio
import signal
from typing import Any

import httpx

from experiments.served import Server
from tests.serving.crowd import Outcome, client, post
from tests.serving.running import running

TOKENS = 120


def _body(i: int) -> dict[str, Any]:
    more = {"stream": True, "stream_options": {"include_usage": True}} if i % 2 else {}
    return {
        "model": "tiny",
        "prompt": f"the keys {i}",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "seed": i,
    } | more


async def drain(server: Server, requests: int) -> tuple[list[Outcome], list[str]]:
    """The answers to what was accepted before the signal, and what became of those who came later."""
    later: list[str] = []
    async with client(server.url) as http:
        accepted = [asyncio.create_task(post(http, "/v1/completions", _body(i))) for i in range(requests)]
        while await asyncio.to_thread(_inside, server) < requests:
            assert not any(task.done() for task in accepted), "answered before the signal: raise TOKENS"
        server.process.send_signal(signal.SIGTERM)
        while not all(task.done() for task in accepted):
            later.append(await _come(server.url))
            await asyncio.sleep(0.05)
        return await asyncio.gather(*accepted), later


def _inside(server: Server) -> float:
    now = server.metrics()
    return now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"]


async def _come(url: str) -> str:
    """What a new client gets: a refusal, of the connection or in words."""
    try:
        async with client(url) as http:
            response = await http.post("/v1/completions", json=_body(0) | {"max_tokens": 1})
    except httpx.ConnectError:
        return "no connection"
    return str(response.status_code)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    for _ in range(args.times):
        with running(rows=8) as (server, _checkpoint):
            answers, later = asyncio.run(drain(server, args.requests))
            status = server.process.wait(30)
            said = server.log.read_text()
        for i, answer in enumerate(answers):
            assert answer.status == 200 and answer.usage["completion_tokens"] == TOKENS, (i, answer)
            assert answer.done == bool(i % 2)
        assert status == 0 and set(later) <= {"503", "no connection"} and "Traceback" not in said, (
            status,
            later,
            said,
        )
        print(
            f"{args.requests} accepted, all answered whole; {len(later)} came later: {set(later)}; status 0",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Ten times what a server can do, by hand: the rest is answered 429 at once, and who is accepted waits no longer than the queue.

    python -m tests.serving.overload --seconds=60

What it can do is measured first, in a closed loop as large as all that may be inside. Of the accepted ones each has all its
tokens, and its latency is at most twice that of the closed loop's slowest: the client takes its cores, too. The memory of the
second half's end is that of its beginning.
"""

import argparse
import asyncio
import collections
import functools
import random
import time
from typing import Any

import httpx

from experiments.served import Server
from experiments.serving_load import quantile
from tests.serving.crowd import Outcome, at_most, client, post
from tests.serving.running import quiet, running

ROWS, WAITING, TIMES = 8, 24, 10
TOKENS = 1600  # so many that the client asks at ten times the server's pace with a small part of a core


def _body(i: int) -> dict[str, Any]:
    words = " ".join(random.Random(i).choices(("keys", "values", "latent", "share"), k=20))
    more = {"stream": True, "stream_options": {"include_usage": True}} if i % 2 else {}
    return {"model": "tiny", "prompt": words, "max_tokens": TOKENS, "ignore_eos": True, "seed": i} | more


async def capacity(server: Server, requests: int) -> tuple[float, float]:
    """(requests per second, the slowest one's seconds) with as many inside as there is room for."""
    async with client(server.url) as http:
        began = time.perf_counter()
        jobs = [functools.partial(post, http, "/v1/completions", _body(i)) for i in range(requests)]
        outcomes = await at_most(ROWS + WAITING, jobs)
        seconds = time.perf_counter() - began
    assert all(outcome.status == 200 for outcome in outcomes)
    return requests / seconds, max(outcome.seconds for outcome in outcomes)


async def flood(server: Server, rate: float, seconds: float) -> tuple[list[Outcome], list[int]]:
    """Poisson arrivals at `rate` for so long; what came of each, and the server's memory once a second."""
    draw, tasks, memory = random.Random(0), [], []
    async with client(server.url, 5000) as http:
        began, due, i = time.perf_counter(), 0.0, 0
        while due < seconds:
            await asyncio.sleep(began + due - time.perf_counter())
            tasks.append(asyncio.create_task(_one(http, i)))
            if due >= len(memory):
                memory.append(server.resident())
            due, i = due + draw.expovariate(rate), i + 1
        return await asyncio.gather(*tasks), memory


async def _one(http: httpx.AsyncClient, i: int) -> Outcome:
    return await post(http, "/v1/completions", _body(i))


def check(outcomes: list[Outcome], slowest: float) -> collections.Counter:
    counts = collections.Counter(outcome.status for outcome in outcomes)
    assert set(counts) == {200, 429}, counts
    for outcome in outcomes:
        if outcome.status == 200:
            assert outcome.usage["completion_tokens"] == TOKENS, outcome
        else:
            assert 1 <= int(outcome.headers["retry-after"]) <= 60, outcome.headers
            assert outcome.value["error"]["code"] == "queue_full", outcome.body
    latest = max(outcome.seconds for outcome in outcomes if outcome.status == 200)
    assert latest <= 2 * slowest, f"an accepted request took {latest:.2f} s, beside {slowest:.2f} s"
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with running(rows=ROWS, waiting=WAITING) as (server, _):
        asyncio.run(capacity(server, 32))  # warm
        can, slowest = asyncio.run(capacity(server, 64))
        outcomes, memory = asyncio.run(flood(server, TIMES * can, args.seconds))
        quiet(server)
        counts = check(outcomes, slowest)
        late = [o.seconds for o in outcomes if o.status == 200]
        refused = quantile([o.seconds for o in outcomes if o.status == 429], 0.99)
        grown = (memory[-1] - memory[len(memory) // 2]) / 2**20
        assert grown < 8, f"{grown:.1f} MiB more in the second half"
        assert "Traceback" not in server.log.read_text()
    print(
        f"{can:.0f} requests/s it can; of {len(outcomes)} at {len(outcomes) / args.seconds:.0f}/s, {counts[200]} were answered "
        f"({counts[200] / args.seconds:.0f}/s; p50 {quantile(late, 0.5):.2f} s, most {max(late):.2f} s, closed loop "
        f"{slowest:.2f} s), {counts[429]} refused (p99 {1e3 * refused:.0f} ms); memory {grown:+.1f} MiB in the second half"
    )


if __name__ == "__main__":
    main()

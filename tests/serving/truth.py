"""/metrics beside what the client counted, by hand:

    python -m tests.serving.truth --requests=200

Requests of both endpoints, streamed or not, of one sample or several, with prompts that share beginnings, stop strings, and
mistakes. Counts must be equal; times as the client saw them, with what the network takes on top.
"""

import argparse
import asyncio
import collections
import functools
import random
from typing import Any

from experiments.served import Server
from tests.serving.crowd import Outcome, at_most, client, post
from tests.serving.running import quiet, running

BEGINNING = "the keys and the values share the latent; " * 8  # whole pages of it


def request(seed: int) -> tuple[str, dict[str, Any]]:
    draw = random.Random(seed)
    text = BEGINNING * draw.choice((0, 1)) + " ".join(
        draw.choices(("keys", "values", "latent"), k=draw.randint(1, 30))
    )
    body: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": draw.randint(1, 40),
        "temperature": draw.choice((0, 1.0)),
    }
    body |= {"n": draw.choice((1, 1, 2, 3)), "seed": seed}
    if draw.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if draw.random() < 0.3:
        body["stop"] = draw.choice(("e", "th", " "))
    if draw.random() < 0.1:
        body["temperature"] = -1
    if draw.random() < 0.5:
        return "/v1/completions", body | {"prompt": text}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


def truth(outcomes: list[Outcome]) -> dict[str, float]:
    """Of the answers, under the names that /metrics has."""
    found: collections.Counter = collections.Counter()
    for outcome in outcomes:
        assert outcome.status in (200, 400), outcome
        if outcome.status == 400:
            continue
        usage = outcome.usage
        found["vllm:prompt_tokens_total"] += usage["prompt_tokens"]
        found["vllm:generation_tokens_total"] += usage["completion_tokens"]
        for reason in _reasons(outcome):
            found[f"finished {reason}"] += 1
            found["vllm:time_to_first_token_seconds_count"] += 1
            found["vllm:e2e_request_latency_seconds_count"] += 1
    return dict(found)


def _reasons(outcome: Outcome) -> list[str]:
    choices = (
        [c for e in outcome.events for c in e["choices"]] if outcome.events else outcome.value["choices"]
    )
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def told(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """What the server counted in the meantime, under the same names."""
    found = {}
    for name, value in now.items():
        if 'finished_reason="' in name:
            name = "finished " + name.partition('finished_reason="')[2].partition('"')[0]
            found[name] = value - sum(
                v for n, v in before.items() if n.endswith(name.removeprefix("finished ") + '"}')
            )
        else:
            found[name] = value - before.get(name, 0)
    return found


async def ask(server: Server, requests: int, many: int) -> list[Outcome]:
    async with client(server.url) as http:
        return await at_most(many, [functools.partial(post, http, *request(i)) for i in range(requests)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--many", type=int, default=12, help="at a time")
    args = parser.parse_args()
    with running(rows=8) as (server, _):
        before = quiet(server)
        outcomes = asyncio.run(ask(server, args.requests, args.many))
        counted, want = told(quiet(server), before), truth(outcomes)
        for name, value in want.items():
            assert counted[name] == value, f"{name}: {counted[name]} where the client counted {value}"
        # Samples of one prompt look it up each; the client's usage has the first one's hits alone.
        hits = sum(o.usage["prompt_cache_hit_tokens"] for o in outcomes if o.status == 200)
        assert (
            0 < hits <= counted["vllm:prefix_cache_hits_total"] <= counted["vllm:prefix_cache_queries_total"]
        )
        streamed = [o for o in outcomes if o.events]
        seen = sum(o.seconds * len(_reasons(o)) for o in outcomes if o.status == 200)
        assert 0 < counted["vllm:e2e_request_latency_seconds_sum"] <= seen
        assert (
            counted["vllm:time_to_first_token_seconds_sum"] <= counted["vllm:e2e_request_latency_seconds_sum"]
        )
    print(
        f"{args.requests} requests, {len(streamed)} streamed, {sum(o.status == 400 for o in outcomes)} refused: "
        f"equal: {dict(sorted(want.items()))}"
    )


if __name__ == "__main__":
    main()

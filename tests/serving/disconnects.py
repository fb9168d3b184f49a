"""Clients that leave at any moment, by hand: nothing of them is left behind.

    python -m tests.serving.disconnects --clients=1000

Each sends a request, streamed or not, of one sample or three, or only a part of one, and leaves: at once, after a random time,
or after some events. Then no request runs or waits, no page is held, the memory has not grown, and the server answers as before.
"""

import argparse
import asyncio
import collections
import functools
import json
import random

from tests.serving.crowd import at_most
from tests.serving.openai_client import client_of, completion_stream
from tests.serving.running import quiet, running

LONG = {"model": "tiny", "temperature": 1.0, "max_tokens": 300, "ignore_eos": True}


def _request(draw: random.Random) -> bytes:
    body = LONG | {"stream": draw.random() < 0.7, "n": draw.choice((1, 1, 3))}
    text = " ".join(draw.choices(("keys", "values", "latent", "the", "share"), k=draw.randint(1, 90)))
    if draw.random() < 0.5:
        path, body = "/v1/completions", body | {"prompt": text}
    else:
        path, body = "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


async def leave(port: int, counts: collections.Counter, seed: int) -> None:
    draw = random.Random(seed)
    raw = _request(draw)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    how = draw.choice(("in the request", "at once", "later", "later", "in the answer", "in the answer"))
    writer.write(raw[: draw.randrange(len(raw))] if how == "in the request" else raw)
    await writer.drain()
    if how == "later":
        await asyncio.sleep(draw.expovariate(5))
    elif how == "in the answer":
        for _ in range(draw.randint(1, 40)):  # lines
            if not await reader.readline():
                break
    counts[how] += 1
    if draw.random() < 0.5:
        writer.transport.abort()  # a reset instead of an end
    writer.close()


async def crowd(port: int, clients: int, many: int, seed: int) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    await at_most(many, [functools.partial(leave, port, counts, seed + i) for i in range(clients)])
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--many", type=int, default=40, help="at a time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with running(rows=8, waiting=1000) as (server, _):
        asyncio.run(
            crowd(server.port, args.clients // 5, args.many, args.seed)
        )  # memory that the first ones take stays
        quiet(server)
        before = server.resident()
        counts = asyncio.run(crowd(server.port, args.clients, args.many, args.seed + args.clients))
        left = quiet(server)
        grown = (server.resident() - before) / 2**20
        completion_stream(client_of(server.url))
        assert "Traceback" not in server.log.read_text()
    assert grown < 16, f"{grown:.1f} MiB more after {args.clients} clients"
    ended = {
        name.partition('finished_reason="')[2][:-2]: n
        for name, n in left.items()
        if "finished_reason" in name
    }
    print(
        f"{args.clients} clients left {dict(counts)}: nothing left behind; ended {ended}; memory {grown:+.1f} MiB"
    )


if __name__ == "__main__":
    main()

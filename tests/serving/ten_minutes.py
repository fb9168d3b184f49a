"""A router, prefill and decode servers under load while one of them is killed every minute, by hand: no request is lost.

    python -m tests.serving.ten_minutes --minutes=10

A killed server is started again after a while, as a supervisor would. Prints the figures of the load.
"""

import argparse
import asyncio
import itertools
import json
import random
import time

from experiments.served import MODEL, load
from experiments.serving_load import Answer, Bounds, Wanted, figures, trace
from tests.serving.deployed import Fleet, apart

BOUNDS = Bounds(ttft=5.0, itl=0.5)


class Crowd:
    """Clients that ask one request after the other until the time is over."""

    def __init__(self, port: int, wanted: list[Wanted], end: float):
        self._port, self._wanted, self._end = port, itertools.cycle(wanted), end
        self.answers: list[Answer] = []
        self.asked: list[Wanted] = []
        self.lost: list[str] = []

    async def one(self) -> None:
        while time.monotonic() < self._end:
            wanted = next(self._wanted)
            try:
                (answer,), _ = await load(self._port, [wanted], limit=1)
            except Exception as error:
                self.lost.append(f"{type(error).__name__}: {error}")
            else:
                self.answers.append(answer)
                self.asked.append(wanted)


async def killing(fleet: Fleet, every: float, back: float, end: float, draw: random.Random) -> list[str]:
    """Kills a server each time, of both roles in turn, and starts it again after `back` seconds; their names."""
    killed: list[str] = []
    roles = itertools.cycle(("decode", "prefill"))
    while time.monotonic() + every < end:
        await asyncio.sleep(every)
        role = next(roles)
        name = draw.choice(sorted(n for n in fleet.servers if n.startswith(role)))
        fleet.kill(name)
        killed.append(name)
        print(f"  {name} killed", flush=True)
        await asyncio.sleep(back)
        await asyncio.to_thread(fleet.start, name)
    return killed


async def run(fleet: Fleet, args: argparse.Namespace) -> None:
    draw = random.Random(args.seed)
    wanted = trace(2000, 400, args.seed, (16, 512), (16, 96))
    began, end = time.monotonic(), time.monotonic() + 60 * args.minutes
    crowd = Crowd(fleet.router.port, wanted, end)
    kills = asyncio.create_task(killing(fleet, args.every, args.back, end, draw))
    await asyncio.gather(*(crowd.one() for _ in range(args.clients)))
    wall = time.monotonic() - began
    killed = await kills
    for name in fleet.servers:
        await asyncio.to_thread(fleet.there, name)
    await asyncio.to_thread(fleet.quiet)
    again = [
        (await load(fleet.router.port, [w], limit=1))[0][0]
        for w in crowd.asked[:: max(1, len(crowd.asked) // 20)]
    ]
    same = sum(
        a.tokens == b.tokens
        for a, b in zip(crowd.answers[:: max(1, len(crowd.asked) // 20)], again, strict=True)
    )
    metrics = fleet.router.metrics()
    counts = {
        name: int(metrics.get(f"deepseek_jax:router_{name}_total", 0))
        for name in ("requests", "retries", "lost")
    }
    print(
        f"{args.minutes:g} minutes, {len(killed)} kills {killed}: {len(crowd.lost)} of {len(crowd.asked)} lost"
    )
    print(f"  {same} of {len(again)} asked again undisturbed: the same; router: {counts}")
    print(f"  {json.dumps(figures(crowd.answers, wall, 0.0, BOUNDS)._asdict())}", flush=True)
    assert not crowd.lost, crowd.lost[:5]
    assert same == len(again) and not fleet.tracebacks(), fleet.tracebacks()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--every", type=float, default=60, help="seconds from the start of a server to the next kill"
    )
    parser.add_argument(
        "--back", type=float, default=5, help="seconds until a killed server is started again"
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="decode computes a prompt whose server is lost")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    router = {"deadline": 300, "patience": 120, "silence": 5, "tries": 5}
    options = {"rows": 8, "chunk": 64, "alone": str(args.alone).lower()}
    with apart(args.prefill, args.decode, router, MODEL, **options) as fleet:
        for name in fleet.servers:
            fleet.there(name)
        asyncio.run(run(fleet, args))


if __name__ == "__main__":
    main()

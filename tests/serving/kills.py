"""SIGKILL of a prefill or a decode server in each state of a request, by hand: no request hangs, no page is left behind, and
the client gets its answer, the same that it gets undisturbed, or one clear error.

    python -m tests.serving.kills --times=20
    python -m tests.serving.kills --times=1 --side=prefill --state=transferring

The states: "handshake" (the servers do not know each other yet), "queued" (they do, no page has come), "transferring" (some
have), "decoding" (an answer that is not streamed is being drawn), "streaming" (some of it is with the client). A killed server is
started again; the request waits for that, or goes to another.
"""

import argparse
import asyncio
import collections
import random
import time
from typing import Any

from tests.serving.crowd import Outcome, client, post
from tests.serving.deployed import Fleet, Sponsor, apart
from tests.serving.running import MODEL
from tests.serving.tap import STATES, Tap

SIDES, ALL = ("prefill", "decode"), (*STATES, "decoding", "streaming")
PROMPT, TOKENS = 700, 240
DEADLINE = 100.0  # seconds in which the router answers


def body(draw: random.Random, state: str) -> dict[str, Any]:
    """Of a request whose prompt no cache has."""
    drawn = {"temperature": draw.choice((0, 1)), "seed": draw.randrange(1000)}
    stream = state == "streaming" or (state != "decoding" and draw.random() < 0.5)
    prompt = [draw.randrange(3, 400) for _ in range(PROMPT)]
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": stream,
        **drawn,
    }


async def ask(fleet: Fleet, wanted: dict[str, Any]) -> Outcome:
    async with client(fleet.router.url) as http:
        return await asyncio.wait_for(post(http, "/v1/completions", wanted), DEADLINE + 20)


def text_of(outcome: Outcome) -> str:
    return outcome.text if outcome.events else outcome.value["choices"][0]["text"]


def error_of(outcome: Outcome) -> str | None:
    """The one clear error that a client got, None if it got none."""
    if outcome.status != 200:
        return str(outcome.value["error"]["message"])
    errors = [event["error"]["message"] for event in outcome.events if "error" in event]
    assert len(errors) <= 1 and bool(errors) != (outcome.done or not outcome.events)
    return errors[0] if errors else None


async def in_state(fleet: Fleet, tap: Tap, state: str, before: dict[str, float]) -> None:
    """Waits until the request is in a state."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if state in STATES:
            if tap.reached.is_set():
                return
        else:
            now = await asyncio.to_thread(fleet.servers["decode-0"].metrics)
            name = "vllm:generation_tokens_total"
            if now[name] > before[name] + 5:
                return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the request did not come into the state {state}")


async def one(fleet: Fleet, tap: Tap, side: str, state: str, draw: random.Random) -> tuple[str, float] | None:
    """(what came of the request, seconds that it took); None: it was answered before it could be killed."""
    wanted, name = body(draw, state), f"{side}-0"
    before = fleet.servers["decode-0"].metrics()
    if state in STATES:
        tap.hold(state)
    began = time.monotonic()
    asked = asyncio.create_task(ask(fleet, wanted))
    await in_state(fleet, tap, state, before)
    if asked.done():  # on a busy machine this process may be late
        await asked
        return None
    fleet.kill(name)
    await asyncio.to_thread(fleet.start, name, side != "prefill")
    outcome = await asked
    seconds = time.monotonic() - began
    await asyncio.to_thread(fleet.there, name)
    await asyncio.to_thread(fleet.quiet)
    assert seconds < DEADLINE + 5, f"it took {seconds:.1f} s"
    if error := error_of(outcome):
        return error, seconds
    again = await ask(fleet, wanted)
    assert text_of(outcome) == text_of(again), "another answer than undisturbed"
    return "answered", seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=1, help="each side in each state")
    parser.add_argument("--side", choices=SIDES, action="append")
    parser.add_argument("--state", choices=ALL, action="append")
    parser.add_argument("--alone", action="store_true", help="decode computes a prompt whose server is lost")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    router = {"deadline": DEADLINE, "patience": 60, "silence": 5}
    with apart(router=router, tapped=True, rows=4, chunk=64, alone=str(args.alone).lower()) as fleet:
        sponsor: list[Sponsor] = []
        tap = Tap(lambda: sponsor[0].real if sponsor else None)
        sponsor.append(Sponsor(fleet, "prefill-0", tap.address))
        for name in list(fleet.servers):
            fleet.there(name)
        for side in args.side or SIDES:
            for state in args.state or ALL:
                came: collections.Counter[str] = collections.Counter()
                longest = 0.0
                late = 0
                while came.total() < args.times:
                    done = asyncio.run(one(fleet, tap, side, state, draw))
                    if done is None:
                        late += 1
                        assert late <= args.times, "requests are answered before the kill"
                        continue
                    what, seconds = done
                    came[what] += 1
                    longest = max(longest, seconds)
                print(
                    f"{side:8} killed, {state:13} {dict(came)}, at most {longest:.1f} s; nothing left behind",
                    flush=True,
                )
        sponsor[0].close()
        tap.close()
        assert not fleet.tracebacks(), fleet.tracebacks()


if __name__ == "__main__":
    main()

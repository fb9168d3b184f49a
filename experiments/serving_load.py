"""A load for engines and servers, and what it measures: a seeded trace, and the arithmetic of latency. Standard library only.

A request's time to first token (TTFT) counts from when it was due, so that a client or a queue that lags is seen. The time
between two pieces of its answer is an inter-token latency (ITL): what a reader waits, whether a piece holds one token or,
with drafts, two. The ITL of a request, which goodput bounds, is the mean time from a token to the next.
"""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Wanted(NamedTuple):
    """One request of a trace. arrival: seconds after the first, at one request a second on average."""

    prompt: list[int]
    max_tokens: int
    arrival: float


class Answer(NamedTuple):
    """What came of one request. times: seconds from when it was due to each piece of its tokens."""

    tokens: list[int]
    times: list[float]

    @property
    def ttft(self) -> float:
        return self.times[0]

    @property
    def itl(self) -> float:
        """Mean seconds from a token to the next; 0 for a single token."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.tokens) - 1)


class Figures(NamedTuple):
    """Of one run; rates per second, latencies in seconds, as (p50, p99). goodput: requests per second that meet the bounds."""

    requests: int
    tokens: int
    tokens_per_s: float
    requests_per_s: float
    ttft: tuple[float, float]
    itl: tuple[float, float]
    goodput: float
    cpu_per_1000: float


class Bounds(NamedTuple):
    """Of a good answer: seconds to its first token, and on average from one to the next."""

    ttft: float
    itl: float


def trace(
    requests: int,
    vocab_size: int,
    seed: int = 0,
    prompts: tuple[int, int] = (16, 256),
    outputs: tuple[int, int] = (32, 128),
    first_id: int = 3,
) -> list[Wanted]:
    """Requests of random ids from `first_id` on, with lengths drawn evenly from both ranges, that arrive as a Poisson process."""
    draw, arrival, wanted = random.Random(seed), 0.0, []
    for _ in range(requests):
        prompt = [draw.randrange(first_id, vocab_size) for _ in range(draw.randint(*prompts))]
        wanted.append(Wanted(prompt, draw.randint(*outputs), arrival))
        arrival += draw.expovariate(1.0)
    return wanted


def quantile(values: Iterable[float], q: float) -> float:
    """The least of the values that at least the share q of them does not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else math.nan


def figures(answers: Sequence[Answer], wall: float, cpu: float, bounds: Bounds) -> Figures:
    """Of answers that took `wall` seconds in all, and `cpu` seconds of the server's cores."""
    tokens = sum(len(answer.tokens) for answer in answers)
    gaps = [late - early for a in answers for early, late in itertools.pairwise(a.times)]
    good = sum(answer.ttft <= bounds.ttft and answer.itl <= bounds.itl for answer in answers)
    return Figures(
        requests=len(answers),
        tokens=tokens,
        tokens_per_s=tokens / wall,
        requests_per_s=len(answers) / wall,
        ttft=(quantile([a.ttft for a in answers], 0.5), quantile([a.ttft for a in answers], 0.99)),
        itl=(quantile(gaps, 0.5), quantile(gaps, 0.99)),
        goodput=good / wall,
        cpu_per_1000=1000 * cpu / tokens,
    )


def median(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over the rounds."""

    def of(values: Sequence) -> object:
        if isinstance(values[0], tuple):
            return tuple(map(statistics.median, zip(*values, strict=True)))
        return statistics.median(values)

    return Figures(*map(of, zip(*rounds, strict=True)))  # type: ignore[arg-type]


def closed_loop(
    wanted: Sequence[Wanted],
    limit: int,
    submit: Callable[[int, Wanted], None],
    step: Callable[[], Iterable[tuple[int, Sequence[int]]]],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Answer], float]:
    """Runs an engine with at most `limit` requests in it: as one is answered, the next enters.

    Args:
        submit: gives the engine a request, under its index in `wanted`.
        step: runs the engine on; yields (index, new tokens) of what has come.

    Returns:
        The answers, in the order of `wanted`, and the seconds that all took.
    """
    answers, due = [Answer([], []) for _ in wanted], [0.0] * len(wanted)
    began, entered, inside = clock(), 0, 0
    while inside or entered < len(wanted):
        while entered < len(wanted) and inside < limit:
            due[entered] = clock()
            submit(entered, wanted[entered])
            entered, inside = entered + 1, inside + 1
        for i, tokens in step():
            if tokens:
                answers[i].tokens.extend(tokens)
                answers[i].times.append(clock() - due[i])
                inside -= len(answers[i].tokens) >= wanted[i].max_tokens
    return answers, clock() - began

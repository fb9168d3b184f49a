"""What a step costs the scheduler: `python -m tests.serving.schedule_speed`. Microseconds of CPU, median and 99th percentile."""

import time

import numpy as np

from deepseek_jax.serving.pages import PagePool
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.scheduler import Limits, Scheduler

ROWS = 64


def step(scheduler: Scheduler, tokens: int) -> float:
    """Schedules a step and takes its results, at once: -> seconds."""
    begin = time.process_time()
    step = scheduler.schedule()
    for row in step.rows:
        scheduler.received(row.running, row.epoch, [1] * tokens, tokens)
    for chunk in step.chunks:
        scheduler.received(chunk.running, chunk.epoch, [1] * chunk.samples, len(chunk.tokens))
    seconds = time.process_time() - begin
    for running in [r for r in scheduler.running if len(r.tokens) >= r.limit]:
        scheduler.finish(running)
    return seconds


def measure(name: str, steps: int = 2000, drafts: int = 0, prompts: list[int] = [], pages: int = 4096):  # noqa: B006
    """64 rows whose prompts had 128 tokens; `prompts` of so many tokens come then, again and again; pages: of the pool."""
    limits = Limits(ROWS + 4, ROWS * 2 + 2048, 2048, 200_000, waiting=ROWS + len(prompts), drafts=drafts)
    scheduler = Scheduler(limits, PagePool(pages))
    rng, count, seconds = np.random.default_rng(0), 0, []
    while len(seconds) < steps:
        sizes = [len(r.request.prompt) for r in (*scheduler.running, *scheduler.waiting)]
        for size in [128] * (ROWS - sizes.count(128)) + [p for p in prompts if p not in sizes]:
            tokens = rng.integers(0, 129_280, size).tolist()
            scheduler.add(Request(str(count), tokens, 1_500 + count % 500 if size == 128 else 4))
            count += 1
        seconds.append(step(scheduler, 1 + drafts))
    steady = np.array(seconds[ROWS:]) * 1e6
    print(f"{name:58} {np.median(steady):7.0f} {np.quantile(steady, 0.99):7.0f}")


if __name__ == "__main__":
    print(f"{ROWS} rows, a step with its results {'':21} {'median':>7} {'p99':>7}")
    measure("decode rows alone")
    measure("decode rows, one draft each, accepted", drafts=1)
    measure("decode rows, prompts of 4,000 tokens come", prompts=[4_000])
    measure("decode rows, a prompt of 120,000 tokens waits for pages", prompts=[120_000], pages=2_200)

"""Which data-parallel rank a new request goes to: each has a queue, slots and pages of its own."""

from collections.abc import Sequence

from deepseek_jax.serving.pages import page_keys
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.scheduler import Scheduler

# What a prompt that is found whole in a rank's cache is worth, in parts of the rank's slots or pages: so much fuller than the
# others may a rank become by prompts that begin alike.
HIT = 0.25


def choose_rank(schedulers: Sequence[Scheduler], request: Request) -> int:
    """The rank that would be the least full with this request, of slots or of pages, whichever is fuller; less HIT times the
    share of the prompt that its cache has. Ranks whose queue is full come last. Nothing is changed."""
    if len(schedulers) == 1:
        return 0
    first = schedulers[0]
    page, ahead = first.pool.page, first.limits.drafts
    keys = page_keys(request.prompt, request.page_salt, first.version, page=page, ahead=ahead)

    def cost(rank: int) -> tuple[bool, float, float]:
        scheduler = schedulers[rank]
        rows, pages = _fullness(scheduler, request)
        found = len(scheduler.pool.lookup(keys)) * page / len(request.prompt)
        return scheduler.is_full, max(rows, pages) - HIT * found, rows + pages

    return min(range(len(schedulers)), key=cost)


def _fullness(scheduler: Scheduler, request: Request) -> tuple[float, float]:
    """Parts of the slots and of the pages that would be taken, those who wait included: over 1, some would wait."""
    limits, pool = scheduler.limits, scheduler.pool
    count = len(scheduler.running) + len(scheduler.waiting) + 1
    tokens = sum(len(running.tokens) for running in scheduler.waiting) + len(request.prompt)
    return count / limits.rows, (pool.held + tokens / pool.page) / pool.pages

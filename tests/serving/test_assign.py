"""Which rank gets a request."""

import random

from deepseek_jax.serving.assign import HIT, choose_rank
from deepseek_jax.serving.pages import PagePool
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.scheduler import Limits, Scheduler


def ranks(n: int, pages: int = 200, **limits) -> list[Scheduler]:
    small = {"rows": 8, "budget": 64, "chunk": 32, "max_model_len": 512, "waiting": 8} | limits
    return [Scheduler(Limits(**small), PagePool(pages, 4)) for _ in range(n)]


def request(i: int, prompt, max_tokens: int = 4, **options) -> Request:
    return Request(str(i), prompt, max_tokens, **options)


def prompt_of(rng: random.Random, size: int) -> list[int]:
    return [rng.randrange(1000) for _ in range(size)]


def computed(scheduler: Scheduler) -> None:
    """All that wait get a slot and are computed whole."""
    while any(r.computed < r.goal for r in scheduler.running) or scheduler.waiting:
        scheduler.schedule()


def test_requests_of_equal_size_are_dealt_out_evenly():
    schedulers, rng = ranks(4), random.Random(0)
    for i in range(16):
        new = request(i, prompt_of(rng, 20))
        schedulers[choose_rank(schedulers, new)].add(new)
    assert [len(s.waiting) for s in schedulers] == [4] * 4


def test_a_rank_with_few_long_sequences_is_full_of_pages():
    """Round robin, or counting requests alone, strands requests behind pages that are not there."""
    schedulers, rng = ranks(2), random.Random(0)
    schedulers[0].add(request(0, prompt_of(rng, 400)))
    for i in range(1, 4):
        schedulers[1].add(request(i, prompt_of(rng, 20)))
    assert choose_rank(schedulers, request(9, prompt_of(rng, 20))) == 1
    for scheduler in schedulers:
        computed(scheduler)
    assert choose_rank(schedulers, request(9, prompt_of(rng, 20))) == 1


def test_a_rank_with_many_short_sequences_is_full_of_rows():
    schedulers, rng = ranks(2), random.Random(0)
    schedulers[0].add(request(0, prompt_of(rng, 200)))
    for i in range(1, 8):
        schedulers[1].add(request(i, prompt_of(rng, 2)))
    assert choose_rank(schedulers, request(9, prompt_of(rng, 20))) == 0


def test_the_rank_that_has_the_prompt_gets_it():
    schedulers, rng = ranks(4), random.Random(0)
    prompt = prompt_of(rng, 64)
    running = schedulers[2].add(request(0, prompt))
    computed(schedulers[2])
    assert choose_rank(schedulers, request(1, prompt)) == 2
    assert choose_rank(schedulers, request(1, prompt, salt="another tenant")) == 0
    assert choose_rank(schedulers, request(1, prompt_of(rng, 64))) == 0
    schedulers[2].finish(running)
    assert choose_rank(schedulers, request(1, prompt)) == 2


def test_with_drafts_too():
    schedulers, rng = ranks(3, drafts=1), random.Random(0)
    prompt = prompt_of(rng, 64)
    schedulers[2].add(request(0, prompt))
    computed(schedulers[2])
    assert choose_rank(schedulers, request(1, prompt)) == 2


def test_a_beginning_that_all_share_strands_no_rank():
    """No rank is fuller than another by more than what a hit is worth, and one request."""
    schedulers, rng = ranks(4, rows=16, pages=1000, waiting=64), random.Random(0)
    beginning = prompt_of(rng, 64)
    for i in range(48):
        new = request(i, beginning + prompt_of(rng, 2))
        schedulers[choose_rank(schedulers, new)].add(new)
        for scheduler in schedulers:
            computed(scheduler)
        counts = [len(s.running) for s in schedulers]
        assert (max(counts) - min(counts)) / 16 <= HIT + 1 / 16
    assert min(counts) >= 9


def test_a_full_queue_is_the_last_choice():
    schedulers, rng = ranks(2, waiting=0, rows=1, pages=400), random.Random(0)
    prompt = prompt_of(rng, 64)
    first = schedulers[0].add(request(0, prompt))
    computed(schedulers[0])
    assert choose_rank(schedulers, request(1, prompt)) == 1
    schedulers[1].add(request(2, prompt_of(rng, 300)))
    assert all(s.is_full for s in schedulers)
    assert choose_rank(schedulers, request(1, prompt)) == 0  # somebody has to say that it is full
    schedulers[0].finish(first)
    assert choose_rank(schedulers, request(1, prompt)) == 0


def test_a_queue_that_is_full_of_short_ones_comes_after_one_with_few_long_ones():
    schedulers, rng = ranks(2), random.Random(0)
    for i in range(16):
        schedulers[0].add(request(i, prompt_of(rng, 2)))
    for i in range(5):
        schedulers[1].add(request(i, prompt_of(rng, 500)))
    assert schedulers[0].is_full and not schedulers[1].is_full
    assert choose_rank(schedulers, request(99, prompt_of(rng, 2))) == 1


def test_the_only_rank():
    assert choose_rank(ranks(1), request(0, [1])) == 0

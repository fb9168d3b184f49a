"""The scheduler and its pool, driven by a simulated device whose draws depend on every latent that it reads.

`Engine` checks every step: that no decode row is left out, the budget, the slots, and that all drawn is the model's own.
"""

import contextlib
import dataclasses
import itertools
import random

import pytest

from deepseek_jax.serving import prefixes
from deepseek_jax.serving.pages import PagePool
from deepseek_jax.serving.request import QueueFullError, Request
from deepseek_jax.serving.scheduler import Limits, Scheduler
from tests.serving.simulated import VOCAB, Engine

PAGE = 4


def engine_of(pages=24, late=1, **limits) -> Engine:
    small = {"rows": 5, "budget": 16, "chunk": 7, "max_model_len": 64, "waiting": 20} | limits
    return Engine(Limits(**small), PagePool(pages, PAGE), late)


def request(name, prompt, max_tokens=4, **options) -> Request:
    return Request(str(name), prompt, max_tokens, **options)


def prompt_of(size: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(size)]


def answers(engine: Engine, *requests: Request) -> list[list[int]]:
    """Of requests alone in the engine, one after the other."""
    for one in requests:
        engine.add(one)
        engine.drain(200)
    return [engine.all[one.id].answer for one in requests]


# --- random operations ----------------------------------------------------------------------------------------------

KINDS = {
    "plain": (10_000, 1, {}),
    "drafts": (5_000, 2, {"drafts": 1}),
    "results at once": (2_000, 0, {"drafts": 1}),
    "reserve": (2_000, 1, {"reserve": True}),
    "invariant": (2_000, 2, {"whole_pages": True, "reserve": True}),
    "invariant drafts": (2_000, 1, {"whole_pages": True, "drafts": 1}),
    "one row": (2_000, 1, {"rows": 1, "budget": 3, "drafts": 1}),
}


def random_request(rng: random.Random, name, beginnings) -> Request:
    tail = [rng.randrange(VOCAB) for _ in range(rng.randrange(5))]
    options = {"stop_ids": (5,), "priority": rng.choice((0, 0, 1)), "salt": rng.choice("aab")}
    options |= rng.choice(({}, {}, {}, {}, {"prompt_logprobs": 1}, {"grammar": object()}))
    prompt = rng.choice(beginnings)[: rng.randrange(1, 25)] + tail
    return request(name, prompt, rng.randrange(1, 30), **options)


def random_operations(rng: random.Random, engine: Engine, aborts=0.05, loads=0.0):
    """Requests with shared beginnings, cancellations in every state, launches with and without drafts, of several tokens at once,
    under changing budgets, results that come late, other weights; for ever."""
    beginnings = [prompt_of(24, seed) for seed in range(3)]
    while True:
        x = rng.random()
        if x < 0.2:
            with contextlib.suppress(QueueFullError):
                engine.add(random_request(rng, len(engine.all), beginnings))
        elif x < 0.2 + aborts:
            engine.abort(str(rng.randrange(len(engine.all) + 1)))
        elif x < 0.6:
            drafts, most = rng.random() < 0.7, engine.scheduler.at_once()
            times = rng.randint(1, max(1, most // (1 + drafts * engine.device.drafts)))
            engine.launch(rng.choice((None, None, 3, 9)), drafts, times)
        elif x < 0.6 + loads:
            engine.load(rng.randrange(3))
        elif len(engine.flight) > engine.late:
            engine.receive()
        yield


def check_answers(engine: Engine):
    """Whoever was not aborted has all its tokens, in order, up to a stop id or max_tokens."""
    for watched in engine.all.values():
        prompt, said = len(watched.request.prompt), watched.answer
        assert watched.mixed or said == watched.alone.tokens[prompt : prompt + len(said)]
        if watched.end != "abort":
            stops = [i for i, token in enumerate(said) if token in watched.request.stop_ids]
            assert stops == ([len(said) - 1] if watched.end == "stop" else [])
            assert watched.end == "stop" or len(said) == watched.request.max_tokens


def run_out(engine: Engine):
    engine.drain(5_000)
    engine.check_pages()
    check_answers(engine)
    assert engine.pool.held == 0 and not engine.scheduler.prefixes._coming
    assert len(engine.scheduler._slots) == engine.scheduler.limits.rows


@pytest.mark.parametrize("kind", KINDS)
def test_after_10000_random_operations_every_page_is_accounted_for_and_every_answer_is_whole(kind):
    operations, late, limits = KINDS[kind]
    engine = engine_of(late=late, **limits)
    for _ in itertools.islice(random_operations(random.Random(kind), engine), operations):
        engine.check_pages()
    run_out(engine)
    done = [watched for watched in engine.all.values() if watched.end in ("stop", "length")]
    assert len(done) > operations / 100
    assert any(step.preempted for step in engine.steps) == (
        not limits.get("reserve") and "rows" not in limits
    )
    assert any(chunk.running.cached_tokens for step in engine.steps for chunk in step.chunks)
    several = any(row.times > 1 for step in engine.steps for row in step.rows)
    assert several or limits.get("reserve")  # where pages, not slots, are what is short


@pytest.mark.parametrize("drafts", [0, 1])
def test_other_weights_find_no_page_of_those_before(drafts):
    """Versions come again, too: what runs while they change never makes its pages known."""
    engine = engine_of(drafts=drafts)
    for _ in itertools.islice(random_operations(random.Random(0), engine, loads=0.02), 2_000):
        engine.check_pages()
    run_out(engine)
    assert sum(not w.mixed and w.end == "length" for w in engine.all.values()) > 20


def test_after_1000_cancellations_at_random_states_nothing_is_left():
    engine, cancelled, states = engine_of(pages=16), 0, set()
    operations = random_operations(random.Random(1), engine, aborts=0.0)
    rng = random.Random(2)
    while cancelled < 1000:
        for _ in range(rng.randrange(25)):
            next(operations)
        everybody = [*engine.scheduler.running, *engine.scheduler.waiting]
        if everybody:
            victim = rng.choice(everybody)
            states.add((victim.slot >= 0, victim.epoch > 0, victim.computed < victim.goal, victim.pending))
            engine.abort(victim.request.id)
            engine.check_pages()
            cancelled += 1
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.abort((engine.scheduler.running + engine.scheduler.waiting)[0].request.id)
    run_out(engine)
    # Waiting, new and preempted; with a slot: in its prompt, with nothing, one or two results in flight.
    assert states >= {(False, False, False, 0), (False, True, False, 0), (True, False, True, 0)}
    assert {pending for slot, *_, pending in states if slot} >= {0, 1, 2}


# --- who gets what in a step -------------------------------------------------------------------------------------------


def test_decode_never_starves_behind_a_prompt():
    engine = engine_of()
    engine.add(request("rows", prompt_of(3), 20))
    engine.turn()
    engine.add(request("prompt", prompt_of(50, 1), 4))
    for _ in range(6):
        step = engine.turn()
        assert [row.running.request.id for row in step.rows] == ["rows"]
        assert [len(chunk.tokens) for chunk in step.chunks] == [7]


def test_prompts_share_what_the_rows_leave_of_the_budget():
    engine = engine_of(budget=12, chunk=8)
    engine.add(request("row", prompt_of(2), 20))
    engine.turn()
    for i in range(2):
        engine.add(request(i, prompt_of(16, i + 1)))
    chunks = [
        [(c.running.request.id, c.start, len(c.tokens)) for c in engine.turn().chunks] for _ in range(3)
    ]
    assert chunks == [[("0", 0, 8), ("1", 0, 3)], [("0", 8, 8), ("1", 3, 3)], [("1", 6, 8)]]


def test_the_engine_may_cut_the_budget_of_chunks_and_rows_go_on():
    engine = engine_of()
    engine.add(request("row", prompt_of(2), 20))
    engine.turn()
    engine.add(request("prompt", prompt_of(16, 1)))
    step = engine.turn(budget=0)
    assert (len(step.rows), len(step.chunks)) == (1, 0)
    step = engine.turn(budget=2)
    assert (len(step.rows), [len(c.tokens) for c in step.chunks]) == (1, [2])


def test_whole_pages_go_on_under_a_budget_below_a_page():
    engine = engine_of(whole_pages=True, reserve=True)
    engine.add(request("prompt", prompt_of(9)))
    sizes = [[len(c.tokens) for c in engine.turn(budget=2).chunks] for _ in range(3)]
    assert sizes == [[4], [4], [1]]
    engine.drain(20)


def test_priority_then_arrival():
    engine = engine_of(rows=1, budget=8)
    engine.add(request("first", prompt_of(3), 1))
    engine.turn()
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", -1)):
        engine.add(request(name, prompt_of(3), 1, priority=priority))
    engine.drain(50)
    begun = [r.request.id for step in engine.steps for r in step.admitted]
    assert begun == ["first", "d", "b", "c", "a"]


def test_who_waits_takes_the_slot_of_a_lower_priority():
    """Of the last in order, and only for its own sake: equal ones wait. What was computed of it is mostly found again."""
    engine = engine_of(rows=2, budget=16)
    for name, priority in (("low", 2), ("lower", 3)):
        engine.add(request(name, prompt_of(8, priority), 20, priority=priority))
    engine.turn()
    engine.add(request("equal", prompt_of(6), 4, priority=3))
    assert not engine.turn().preempted and not engine.turn().preempted
    engine.add(request("high", prompt_of(6, 9), 6, priority=0))
    step = engine.turn()
    assert [r.request.id for r in step.preempted] == ["lower"]
    assert [row.running.request.id for row in step.rows] == ["low"]
    step = engine.turn()
    assert [r.request.id for r in step.admitted] == ["high"] and not step.preempted
    engine.drain(200)
    lower = [chunk for step in engine.steps for chunk in step.chunks if chunk.running.request.id == "lower"]
    assert lower[-1].start == 8  # two pages are found
    assert [r.request.id for step in engine.steps for r in step.preempted] == ["lower"]


def test_who_waits_takes_the_pages_of_lower_priorities_or_none():
    """As few as will do; if all would not do, nobody loses anything for it."""
    engine = engine_of(pages=16, rows=5, budget=64, chunk=32)
    for i in range(4):
        engine.add(request(i, prompt_of(12, i), 20, priority=i))
    engine.turn()
    engine.turn()
    assert [len(r.pages) for r in engine.scheduler.running] == [4] * 4
    engine.add(request("high", prompt_of(20, 8), 2, priority=2))  # 5 pages, and one for those who run
    assert not engine.turn().preempted
    engine.abort("1")
    assert [r.request.id for r in engine.turn().preempted] == ["3"]
    engine.drain(200)
    engine.check_pages()


def test_with_reserved_pages_nobody_loses_a_slot():
    engine = engine_of(rows=1, budget=8, reserve=True)
    engine.add(request("low", prompt_of(3), 6, priority=1))
    engine.turn()
    engine.add(request("high", prompt_of(3), 6))
    engine.drain(50)
    assert not any(step.preempted for step in engine.steps)


@pytest.mark.parametrize("seed", range(4))
def test_no_slot_is_kept_from_a_higher_priority(seed):
    """Where there are pages for all: whoever waits behind full slots, before one who runs and not for a page under way, has a
    slot freed at once, unless one is about to be."""
    engine, rng, before = engine_of(pages=200, rows=3, waiting=40), random.Random(seed), 0
    beginnings = [prompt_of(24, i) for i in range(3)]
    for i in range(400):
        if rng.random() < 0.4:
            asked = random_request(rng, i, beginnings)
            with contextlib.suppress(QueueFullError):
                engine.add(dataclasses.replace(asked, priority=rng.randrange(5)))
        if rng.random() < 0.05:
            engine.abort(str(rng.randrange(i + 1)))
        scheduler = engine.scheduler
        ready = [r for r in scheduler.waiting if scheduler.prefixes.find(r) is not None]
        full = not scheduler._slots and all(r.left > 0 for r in scheduler.running)
        last = max((r.request.priority for r in scheduler.running), default=9)
        must = full and any(r.request.priority < last for r in ready)
        before += must
        assert len(engine.turn().preempted) == must
    assert before > 10
    run_out(engine)


def test_a_large_request_is_not_overtaken_for_ever():
    """Small ones that would fit come all the time; it waits for the pages of those before it, no longer."""
    engine, rng = engine_of(pages=16), random.Random(0)
    for i in range(40):
        if i == 10:
            engine.add(request("large", prompt_of(52, 99), 4))
        with contextlib.suppress(QueueFullError):
            engine.add(request(i, prompt_of(5, i), rng.randrange(4, 9)))
        engine.turn()
    assert engine.all["large"].end == "length"
    engine.drain(1000)


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.parametrize("late", [0, 1, 2])
def test_no_row_is_launched_that_max_tokens_cannot_use(drafts, late):
    engine = engine_of(drafts=drafts, late=late)
    running = engine.add(request("a", prompt_of(6), 9))
    engine.drain(50)
    draws = sum(len(step.rows) for step in engine.steps) + 1
    assert engine.stale == 0 and draws <= 9 and 15 <= len(running.tokens) <= 15 + drafts
    assert drafts or draws == 9


def test_rows_take_several_tokens_at_once_only_where_nobody_is_held_up():
    """As many as the sequence that ends first wants; one, where a prompt has its turn or finds a slot, or a grammar reads."""
    engine = engine_of(rows=2, budget=8)
    at_once = engine.scheduler.at_once
    assert at_once() > 8  # nobody is here: it holds up no other rank
    engine.add(request("a", prompt_of(3), 9))
    assert at_once() == 1  # it finds a slot
    engine.turn(budget=2)
    assert at_once() == 1  # its prompt goes on
    engine.turn()
    assert at_once() == 8
    engine.add(request("b", prompt_of(3, 1), 4))
    assert at_once() == 1
    engine.turn()
    engine.add(request("c", prompt_of(3, 2), 4, grammar=object()))
    assert at_once() == 3  # c finds no slot
    step = engine.launch(drafts=False, times=3)
    assert [row.times for row in step.rows] == [3, 3]
    assert at_once() == 4  # b wants no more
    while engine.flight:
        engine.receive()
    engine.turn()
    assert [r.request.id for r in engine.scheduler.running] == ["a", "c"] and at_once() == 1
    engine.drain(20)
    check_answers(engine)


def test_a_row_with_a_grammar_waits_for_its_last_token():
    engine = engine_of()
    engine.add(request("free", prompt_of(3), 8))
    engine.add(request("bound", prompt_of(3), 8, grammar=object()))
    rows = [[row.running.request.id for row in engine.turn().rows] for _ in range(5)]
    assert rows == [[], ["free"], ["free", "bound"], ["free"], ["free", "bound"]]


def test_a_sequence_ends_in_its_own_pages():
    """The last token needs no room; a draft behind the last but one does. The device fails if a token has no page."""
    for max_tokens, drafts, pages in ((4, 0, 2), (5, 0, 2), (6, 0, 3), (3, 1, 2), (4, 1, 2), (5, 1, 3)):
        for reserve, late in itertools.product((False, True), (0, 1, 2)):
            engine = engine_of(pages, late, drafts=drafts, reserve=reserve)
            running = engine.add(request("a", prompt_of(4), max_tokens))
            engine.turn()
            assert len(running.pages) == (pages if reserve else 1)
            engine.drain(50)


# --- who is refused ------------------------------------------------------------------------------------------------------


def test_what_can_never_fit_is_refused_not_queued():
    engine = engine_of(pages=4, max_model_len=100)
    engine.add(request("fits", prompt_of(10), 7))  # the last token needs no room
    with pytest.raises(
        ValueError, match=r"prompt of 10 tokens \+ max_tokens=8 take 5 pages, and the cache has 4: ask"
    ):
        engine.scheduler.add(request("a", prompt_of(10), 8))
    with pytest.raises(ValueError, match=r"prompt of 10 tokens \+ max_tokens=91 exceeds the 100 tokens"):
        engine.scheduler.add(request("a", prompt_of(10), 91))
    with pytest.raises(ValueError, match="no token to compute"):
        engine.scheduler.add(request("a", []))
    with pytest.raises(ValueError, match="id='fits' is that of a request that is not ended"):
        engine.scheduler.add(request("fits", prompt_of(3)))
    assert len(engine.scheduler.waiting) == 1
    engine.drain(50)
    drafting = engine_of(pages=4, max_model_len=100, drafts=1)
    with pytest.raises(ValueError, match="take 5 pages"):
        drafting.scheduler.add(request("a", prompt_of(10), 7))
    drafting.add(request("fits", prompt_of(10), 6))
    drafting.drain(50)


def test_so_many_wait_as_may_beyond_those_that_find_a_slot():
    engine = engine_of(rows=2, waiting=1, budget=8)
    for i in range(3):
        engine.add(request(i, prompt_of(3)))
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        engine.scheduler.add(request("late", prompt_of(3)))
    engine.turn()
    with pytest.raises(QueueFullError, match="1 requests wait already"):
        engine.scheduler.add(request("late", prompt_of(3)))
    engine.abort("2")
    engine.add(request("late", prompt_of(3)))
    engine.drain(50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 5}, "budget=5 must be at least 6: rows=5 of 1 tokens"),
        ({"budget": 10, "drafts": 1}, "budget=10 must be at least 11: rows=5 of 2 tokens"),
        ({"budget": 8, "whole_pages": True}, "budget=8 must be at least 9"),
        ({"chunk": 3, "whole_pages": True}, "chunk=3 must be at least a page of 4 tokens"),
        ({"rows": 0}, "rows=0 must be positive"),
    ],
)
def test_limits_under_which_something_would_starve_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        engine_of(**change)


# --- preemption, ends, late results --------------------------------------------------------------------------------------


def pressed(late=1, **limits) -> tuple[Engine, str]:
    """Two sequences in so few pages that the second has just lost its own; what the step before launched is in flight."""
    engine = engine_of(pages=6, late=late, **limits)
    engine.add(request("first", prompt_of(8), 12))
    engine.add(request("second", prompt_of(8, 1), 12))
    while not engine.launch().preempted:
        if len(engine.flight) > late:
            engine.receive()
    return engine, engine.steps[-1].preempted[0].request.id


def test_the_last_in_order_is_preempted_and_comes_back_to_its_own_pages():
    engine, name = pressed()
    assert name == "second"
    again = engine.scheduler.waiting[0]
    assert again.request.id == "second" and again.slot < 0 and not again.pages and not again.pending
    engine.abort("first")
    step = engine.turn()
    (chunk,) = step.chunks
    assert step.admitted == [again] and chunk.start == 8 == (len(again.tokens) - 1) // PAGE * PAGE
    assert again.cached_tokens == 0  # of the prompt, when it came
    engine.drain(50)
    check_answers(engine)


def test_a_low_priority_is_preempted_though_it_came_first():
    engine = engine_of(pages=6)
    engine.add(request("low", prompt_of(8), 12, priority=1))
    engine.add(request("high", prompt_of(8, 1), 12))
    engine.drain(100)
    assert {r.request.id for step in engine.steps for r in step.preempted} == {"low"}
    check_answers(engine)


def test_nobody_is_given_the_last_pages_that_those_who_run_will_soon_want():
    """It would lose them at once, and what it had computed."""
    engine = engine_of(pages=4)
    engine.add(request("runs", prompt_of(6), 6))
    engine.turn()
    engine.add(request("wants two", prompt_of(8, 1), 1))
    assert (engine.pool.free, engine.turn().admitted) == (2, [])
    engine.abort("wants two")
    engine.add(request("wants one", prompt_of(4, 1), 1))
    assert [r.request.id for r in engine.turn().admitted] == ["wants one"]
    engine.drain(50)
    assert not any(step.preempted for step in engine.steps)


def test_who_is_preempted_goes_before_those_who_came_later():
    engine, _ = pressed()
    engine.add(request("later", prompt_of(3, 2), 2))
    assert [r.request.id for r in engine.scheduler.waiting] == ["second", "later"]
    engine.drain(100)


@pytest.mark.parametrize("late", [1, 2])
@pytest.mark.parametrize("drafts", [0, 1])
def test_late_results_of_a_preempted_sequence_count_nothing(late, drafts):
    """Counts of tokens in flight that went negative are the commonest crash of others: vllm#47900, #49620, #57562."""
    engine, name = pressed(late, drafts=drafts)
    running = next(r for r in engine.scheduler.waiting if r.request.id == name)
    tokens = list(running.tokens)
    for _ in range(late):
        engine.receive()
    assert engine.stale == late
    assert running.tokens == tokens and (running.pending, running.unsure, running.computed) == (0, 0, 0)
    engine.drain(100)
    check_answers(engine)


def test_a_result_is_stale_after_the_end_too():
    engine = engine_of()
    running = engine.add(request("a", prompt_of(3), 9))
    engine.turn()
    epoch = running.epoch
    engine.scheduler.finish(running)
    engine.scheduler.finish(running)
    assert not engine.scheduler.received(running, epoch, [1], 3)
    assert not engine.scheduler.waiting and not engine.scheduler.running and engine.pool.held == 0
    assert engine.scheduler.abort("a") is None


def test_abort_finds_a_request_in_every_queue():
    """Waiting, in its prompt, decoding with results in flight, preempted: sglang#37833, #36876."""
    for name in ("first", "second"):
        engine, _ = pressed()
        assert engine.scheduler.abort(name).request.id == name
        engine.all[name].end = "abort"
        engine.check_pages()
        run_out(engine)
    engine = engine_of()
    running = engine.add(request("a", prompt_of(20)))
    assert engine.scheduler.abort("a") is running and not engine.scheduler.waiting
    engine.add(request("a", prompt_of(20)))
    engine.turn()
    assert engine.scheduler.abort("a").slot == -1 and engine.pool.held == 0
    assert engine.scheduler.abort("unknown") is None


def test_nothing_is_preempted_where_pages_are_reserved():
    engine = engine_of(pages=6, reserve=True)
    for i in range(4):
        engine.add(request(i, prompt_of(8, i), 5))
    assert len(engine.turn().admitted) == 2
    engine.drain(100)
    assert not any(step.preempted for step in engine.steps)


# --- beginnings that are found -------------------------------------------------------------------------------------------


def test_a_prompt_finds_the_full_pages_of_one_that_began_alike():
    engine = engine_of()
    answers(engine, request("a", prompt_of(14)), request("b", [*prompt_of(10), 1, 2, 3]))
    (chunk,) = (c for step in engine.steps for c in step.chunks if c.running.request.id == "b")
    assert chunk.start == 8 == chunk.running.cached_tokens


def test_a_prompt_that_is_found_whole_still_computes_its_last_token():
    engine = engine_of()
    answers(engine, request("a", prompt_of(9)), request("b", prompt_of(8)), request("c", prompt_of(9)))
    starts = {
        c.running.request.id: (c.start, c.tokens) for step in engine.steps for c in step.chunks if c.samples
    }
    assert starts["b"] == (4, prompt_of(8)[4:])
    assert starts["c"] == (8, prompt_of(9)[8:])


def test_an_answer_is_found_as_the_beginning_of_the_next_prompt():
    engine = engine_of()
    (said,) = answers(engine, request("a", prompt_of(6), 11))
    next_turn = engine.add(request("b", prompt_of(6) + said + [1]))
    engine.drain(50)
    assert next_turn.cached_tokens == 16


def test_in_invariant_mode_no_page_that_rows_wrote_to_is_found():
    """A chunk computes other bits than rows: who asks next must not get either by chance."""
    for drafts in (0, 1):
        engine = engine_of(whole_pages=True, reserve=True, drafts=drafts)
        (said,) = answers(engine, request("a", prompt_of(6), 11))
        next_turn = engine.add(request("b", prompt_of(6) + said + [1]))
        engine.drain(50)
        assert next_turn.cached_tokens == 4
    for drafts, found in (
        (0, 8),
        (1, 4),
    ):  # the draft head's last latent of a prompt of whole pages is written by a row
        engine = engine_of(whole_pages=True, reserve=True, drafts=drafts)
        (said,) = answers(engine, request("a", prompt_of(8), 11))
        next_turn = engine.add(request("b", prompt_of(8) + said + [1]))
        engine.drain(50)
        assert next_turn.cached_tokens == found


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 0}])
def test_what_is_asked_of_all_tokens_of_a_prompt_is_found_in_no_page(asked):
    engine = engine_of()
    answers(engine, request("a", prompt_of(14)), request("b", prompt_of(14), **asked))
    starts = [c.start for step in engine.steps for c in step.chunks if c.running.request.id == "b"]
    assert starts == [0, 7]


@pytest.mark.parametrize("other", [{"salt": "x"}, {"version": 1}])
def test_pages_of_another_salt_or_version_are_not_found(other):
    engine = engine_of()
    answers(engine, request("a", prompt_of(14)))
    if "version" in other:
        engine.load(1)
    running = engine.add(request("b", prompt_of(14), salt=other.get("salt", "")))
    engine.drain(50)
    assert running.cached_tokens == 0


@pytest.mark.parametrize("version", [0, 1])
def test_who_runs_while_the_weights_change_makes_no_page_known(version):
    """Even if they are called as those before, for a caller may load without counting; and even behind a first page that the
    new ones computed."""
    engine = engine_of()
    first = engine.add(request("a", prompt_of(20), 10))
    engine.turn()
    engine.load(version)
    engine.drain(50)
    answers(engine, request("a page", prompt_of(5)))
    second = engine.add(request("b", [*first.tokens[:28], 1]))
    engine.drain(50)
    assert second.cached_tokens == 4


def test_who_waits_while_the_weights_change_goes_by_the_new_ones():
    engine = engine_of()
    for name in "ab":
        engine.add(request(name, prompt_of(21)))
    engine.turn()
    assert engine.scheduler.waiting[0].keys
    engine.load(1)
    engine.drain(50)
    last = engine.add(request("c", prompt_of(21)))
    engine.drain(50)
    assert last.cached_tokens == 20


def test_nobody_waits_for_pages_of_other_weights():
    engine = engine_of()
    engine.add(request("a", prompt_of(30), 10))
    engine.turn(budget=2)
    engine.load(0)
    engine.add(request("b", prompt_of(30)))
    assert [r.request.id for r in engine.turn().admitted] == ["b"]
    engine.drain(50)


@pytest.mark.parametrize("drafts", [0, 1])
def test_samples_of_a_prompt_wait_for_its_pages_and_share_them(drafts):
    engine = engine_of(drafts=drafts)
    samples = [engine.add(request(i, prompt_of(21), 6, seed=i)) for i in range(5)]
    while any(sample.computed < 20 for sample in samples):
        engine.turn()
    assert len({tuple(sample.pages[:5]) for sample in samples}) == 1 and engine.pool.held <= 5 + 5 * 2
    computed = sum(len(chunk.tokens) for step in engine.steps for chunk in step.chunks)
    assert computed == 21 + 4
    engine.drain(50)
    check_answers(engine)


@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_who_waits_for_a_page_goes_on_by_itself_if_the_other_is_gone(end):
    engine = engine_of(pages=12, budget=8, chunk=4)
    if end == "preempt":  # by one before it that grows
        engine.add(request("grows", prompt_of(1, 7), 40, priority=-1))
    engine.add(request("computes", prompt_of(29), 3))
    waits = engine.add(request("waits", prompt_of(29), 3))
    engine.turn()
    engine.turn()
    assert waits.slot < 0 and waits.awaits is not None
    if end == "abort":
        engine.abort("computes")
    else:
        engine.scheduler._preempt(engine.scheduler.running[-1])
    assert engine.scheduler.prefixes._coming == {}
    engine.turn()
    assert (waits.slot >= 0) == (end == "abort")  # the preempted one comes first, and is waited for again
    engine.drain(100)
    check_answers(engine)


def test_who_waits_for_a_page_holds_up_nobody():
    engine = engine_of(chunk=4)
    for name, prompt in (("a", prompt_of(21)), ("waits", prompt_of(21)), ("other", prompt_of(9, 1))):
        engine.add(request(name, prompt))
    assert [r.request.id for r in engine.turn().admitted] == ["a", "other"]
    engine.drain(50)


def test_nobody_waits_for_one_of_lower_priority():
    """Who comes before both would hold the one up, and by it the other."""
    engine = engine_of()
    engine.add(request("low", prompt_of(21), 3, priority=1))
    engine.turn()
    high = engine.add(request("high", prompt_of(21), 3))
    engine.turn()
    assert high.slot >= 0
    engine.drain(50)


def test_a_page_is_found_from_the_next_step_on_not_in_the_same():
    """Chunks of one step may be rows of one program."""
    engine = engine_of(chunk=8)
    engine.add(request("a", prompt_of(8)))
    b = engine.add(request("b", prompt_of(9)))
    assert len(engine.turn().admitted) == 1
    step = engine.turn()
    assert step.admitted == [b] and step.chunks[0].start == 8


def test_the_draft_head_finds_what_it_would_have_computed():
    """The draft head's latent of a page's last token depends on the token behind. So do keys: b and c have the first page of
    a, but other tokens behind it, each another; the second page of c is that of b, behind b's own first page. Leaving the last
    page found out would give c the first page of a, and the second of b."""
    engine = engine_of(drafts=1)
    page = prompt_of(4)
    a, b, c = page + [1] * 6, page + [2] * 6, page + [2] * 6 + [3, 4]
    runs = [
        engine.add(request(i, prompt, 12)) for i, prompt in enumerate((a, b, c, c)) if not engine.drain(50)
    ]
    engine.drain(50)
    assert [r.cached_tokens for r in runs] == [0, 0, 8, 8]  # each draft's acceptance was compared on the way
    assert runs[0].pages == [] and len(engine.all) == 4


def test_a_page_is_hashed_once_per_sequence_and_told_once_per_slot(monkeypatch):
    """However often it is looked up, preempted and looked up again."""
    engine, hashed, told = engine_of(pages=6), [], []
    keys_of, register = prefixes.page_keys, engine.pool.register

    def count(tokens, *args):
        keys = keys_of(tokens, *args)
        hashed.extend(keys)
        return keys

    monkeypatch.setattr(prefixes, "page_keys", count)
    monkeypatch.setattr(engine.pool, "register", lambda *args: told.append(args[:2]) or register(*args))
    sequences = [engine.add(request(i, prompt_of(8, i), 12)) for i in range(2)]
    while not engine.turn().preempted:
        assert len(told) == len(set(told))
    engine.drain(100)
    assert len(hashed) == len(set(hashed)) == sum((len(r.tokens) - 1) // PAGE for r in sequences)


def test_a_page_that_was_found_is_not_told_again(monkeypatch):
    engine, told = engine_of(), []
    answers(engine, request("a", prompt_of(14), 1))
    register = engine.pool.register
    monkeypatch.setattr(engine.pool, "register", lambda *args: told.append(args[0]) or register(*args))
    running = engine.add(request("b", [*prompt_of(14), 1, 2], 1))
    engine.turn()
    assert told == running.pages[3:]


def test_two_schedulers_share_nothing():
    """One for each data-parallel rank."""
    limits = Limits(2, 8, 8, 64, 8)
    a, b = (Scheduler(limits, PagePool(8, PAGE)) for _ in range(2))
    a.add(request("x", prompt_of(9)))
    b.add(request("x", prompt_of(9)))
    a.schedule()
    a.schedule()
    assert b.waiting and not b.running and b.pool.cached == b.pool.held == 0

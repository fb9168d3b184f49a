"""The engine against the whole forward pass over each prompt alone, with the same weights."""

import dataclasses
import queue

import jax
import numpy as np
import pytest

from deepseek_jax.serving import engine as engines
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import Sampling
from deepseek_jax.serving.thread import EngineThread
from tests.oracle.sampling import Case, distribution
from tests.serving import routed
from tests.serving.greedy import greedy
from tests.serving.tiny_engine import CFG, OPTIONS, SHOWN, device, engine, model, run

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CFG.vocab_size, n).tolist() for n in (5, 1, 12, 100, 130, 64, 200, 70)]
NEW = 20


def requests(prompts=PROMPTS, new=NEW, **options):
    return [Request(str(i), prompt, new, **options) for i, prompt in enumerate(prompts)]


def alone(prompts=PROMPTS, new=NEW):
    m = model()
    return greedy(m.params, m.config, m.balance_bias, prompts, new)


def ids(out):
    return [[token.id for token in row] for row in out.values()]


def test_greedy_tokens_are_those_of_each_prompt_alone():
    """More prompts than slots, chunks of prompts longer than one, then all of it again from the prefix cache, in another
    order."""
    made, want = engine(), alone()
    assert ids(run(made, requests())) == want
    assert made.stats.cache_hits == 0
    assert ids(run(made, requests(PROMPTS[::-1]))) == want[::-1]
    assert made.stats.cache_hits == 448  # pages that lie before the last token: 64 * (1 + 2 + 0 + 3 + 1)
    pool = made.schedulers[0].pool
    assert (pool.held, pool.free + pool.cached) == (0, pool.pages)


def test_logprobs_of_prompt_and_answer():
    """Against `Model.score` of the whole: sums of float32 in another order."""
    prompt = PROMPTS[4]
    updates = []
    made = engine()
    made.submit(Request("a", prompt, NEW, logprobs=0, prompt_logprobs=3))
    while made.has_work:
        updates += made.step()
    tokens = [token for update in updates for token in update.tokens]
    (given,) = [update.prompt for update in updates if update.prompt is not None]
    want = model().score(prompt + [token.id for token in tokens])
    assert [token.id for token in given] == prompt and given[0].logprob is None
    got = [token.logprob for token in (*given[1:], *tokens)]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert all(len(token.top) == 3 and token.logprob <= token.top[0][1] + 1e-6 for token in given[1:])


def test_routes_of_all_tokens_with_prefixes_of_the_cache():
    """Pages are found that chunks of others filled, who leave at once among them; who does not ask shares none with them, before
    or after; and for more requests than slots."""
    made, m = engine(), model()
    more = [PROMPTS[6][:150], [*PROMPTS[6][:128], 1, 2], PROMPTS[4][:65]]
    run(made, requests(PROMPTS))
    made.submit(Request("leaves", PROMPTS[6], NEW, routes=True))
    for _ in range(2):
        made.step()
    made.abort("leaves")
    hits = made.stats.cache_hits
    got = routed.run(made, requests(more, routes=True))
    assert made.stats.cache_hits - hits == 2 * 128  # the last one's page was filled by one who did not ask
    got += routed.run(made, requests([*PROMPTS, [*got[0][0], 5]], routes=True))
    routed.assert_same(got, m.params, m.config, m.balance_bias)
    assert all((routes >= 0).all() for _, routes in got)
    (update,) = [u for u in _updates(made, Request("a", PROMPTS[0], 1)) if u.tokens]
    assert update.routes is None and update.tokens[0].routes is None


def _updates(made, request):
    made.submit(request)
    found = []
    while made.has_work:
        found += made.step()
    return found


class Thirds:
    """A grammar: all but every third id."""

    def mask(self):
        bits = np.arange(96) % 3 > 0
        return np.packbits(bits, bitorder="little").view("<u4")

    def accept(self, token):
        return token % 3 > 0

    def rollback(self, tokens):
        pass


STOPS = (1, 2, 4, 5, 7, 8, 10)
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.7}
SETTINGS = [
    ({"temperature": 1.0}, {}),
    ({"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01}, {"logprobs": 2, "kept": True}),
    ({"temperature": 1.2, **PENALTIES, "logit_bias": {5: 2, 40: -100}}, {}),
    (PENALTIES, {"min_tokens": 15, "stop_ids": STOPS}),
    (
        {"temperature": 1.0, "top_k": 30, **PENALTIES},
        {"min_tokens": 5, "stop_ids": STOPS, "grammar": Thirds()},
    ),
    ({"temperature": 0.7, "logit_bias": {3: 4}}, {"seed": 2**40 + 5}),
]


def test_each_request_is_drawn_by_its_own_settings():
    """Together, where the pages are not enough, so that some are preempted, and each alone: the same tokens. The probability
    of each is what the definition makes of the model's logits, and of the tokens before it; those are equal to 1e-4, which
    temperature and penalties make 4 times as much."""
    prompts = [RNG.integers(0, CFG.vocab_size, n).tolist() for n in (240, 250, 245, 235, 30, 64)]
    asked = [
        Request(str(i), prompt, 64, Sampling(**sampling), **{"seed": i, **options})
        for i, (prompt, (sampling, options)) in enumerate(zip(prompts, SETTINGS, strict=True))
    ]
    made = engine()
    assert made.schedulers[0].pool.allocate(
        7
    )  # nobody gives them back: 9 are left for 4 sequences of up to 5
    together = run(made, asked)
    assert made.stats.preemptions > 0
    for request in asked:
        tokens = together[request.id]
        answer = [token.id for token in tokens]
        assert answer == [token.id for token in run(engine(), [request])[request.id]]
        logits = np.asarray(model().logits([*request.prompt, *answer]))[len(request.prompt) - 1 :]
        allowed = frozenset(i for i in range(CFG.vocab_size) if i % 3) if request.grammar else None
        for i, token in enumerate(tokens):
            prob = distribution(logits[i], Case(request, tuple(answer[:i]), allowed))
            np.testing.assert_allclose(token.sampled_logprob, np.log(prob[token.id]), atol=4e-4)
            could = (
                None if token.kept is None else np.unpackbits(token.kept.view(np.uint8), bitorder="little")
            )
            assert (could is not None) == request.kept
            assert could is None or (could[: CFG.vocab_size] == (prob > 0)).all()
    assert [len(tokens) for tokens in together.values()][:3] == [64] * 3
    assert 15 < len(together["3"]) <= 64 and 5 < len(together["4"]) <= 64


def test_a_prompt_that_is_preempted_before_its_first_token_is_counted_once(monkeypatch):
    """Two sequences grow while the prompt of a third one, whose pages they take, is computed."""
    monkeypatch.setattr(engines, "LOOK", 0.0)
    slowly = dataclasses.replace(OPTIONS, stall=1e-9)  # beside decode rows, the smallest chunk
    made, lengths = Engine(device(), slowly), (36, 35, 500)
    assert made.schedulers[0].pool.allocate(5)
    prompts = [RNG.integers(0, CFG.vocab_size, n).tolist() for n in lengths]
    run(made, [Request(str(i), p, min(40, 512 - len(p))) for i, p in enumerate(prompts)])
    assert made.stats.preemptions > 0
    assert made.stats.cache_queries == made.stats.prompt == sum(lengths)


def test_nothing_is_traced_or_compiled_behind_the_start():
    """Prompts of all sizes, one to four at once, drawn in all ways; and what the start made once is found by whom launches it."""
    made, heard, counting = engine(), [], True
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: heard.append(event) if counting and "/compile/" in event else None
    )
    ways = [Sampling(), Sampling(1.0), Sampling(0.7, top_p=0.9, top_k=5), Sampling(1.0, presence_penalty=1.0)]
    for at_once in (1, 2, 4):
        prompts = [RNG.integers(0, CFG.vocab_size, 1 + 21 * (i + at_once)).tolist() for i in range(at_once)]
        run(made, [Request(str(i), p, 5, ways[i], logprobs=2) for i, p in enumerate(prompts)])
    counting = False
    assert not heard


def test_a_screen_shows_which_program_is_compiled():
    sizes = device().sizes
    compiled, total = SHOWN[OPTIONS, CFG], len(sizes.chunks) + len(sizes.rows)
    assert [line.partition(":")[0] for line in compiled] == [
        *(f"program {i} of {total}" for i in range(1, total + 1)),
        f"timing the {total} programs",
    ]
    assert compiled[0].endswith(": 1 x 16 tokens of prompts") and compiled[-2].endswith("4 rows that decode")


def test_an_id_is_in_use_until_its_end_was_told():
    """Else the next request of that id would hear the end of the one before."""
    made = engine()
    made.submit(Request("a", PROMPTS[0], 5))
    made.abort("a")
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        made.submit(Request("a", PROMPTS[1], 5))
    assert [(update.id, update.finish_reason) for update in made.step()] == [("a", "abort")]
    made.submit(Request("a", PROMPTS[1], 2, min_tokens=2**40, stop_ids=range(CFG.vocab_size - 1)))
    tokens = []
    while made.has_work:
        tokens += [token.id for update in made.step() for token in update.tokens]
    assert tokens == [CFG.vocab_size - 1] * 2  # of min_tokens, as many as max_tokens allows


def test_a_thread_answers_several_callers_and_aborts():
    thread, seen = EngineThread(engine()), queue.Queue()
    thread.submit(Request("long", PROMPTS[0], 400), seen.put)
    thread.submit(Request("short", PROMPTS[1], 3), seen.put)
    first = seen.get(timeout=60)
    assert first.id in ("long", "short") and first.tokens
    updates = [first]
    while not any(update.id == "short" and update.finish_reason for update in updates):
        updates.append(seen.get(timeout=60))
    thread.abort("long")
    while updates[-1].id != "long" or updates[-1].finish_reason is None:
        updates.append(seen.get(timeout=60))
    assert updates[-1].finish_reason == "abort"
    thread.close()
    pool = thread.engine.schedulers[0].pool
    assert pool.held == 0 and not thread.engine.has_work

"""The scheduler and its pool, driven by a simulated device whose draws depend on every latent that it reads."""

import contextlib
import random

import pytest

from deepseek_jax.serving.pages import PagePool
from deepseek_jax.serving.request import QueueFullError, Request
from deepseek_jax.serving.scheduler import Limits
from tests.serving.simulated import VOCAB, Engine

KINDS = {
    "plain": {},
    "drafts": {"drafts": 1},
    "reserve": {"reserve": True},
    "invariant": {"whole_pages": True, "reserve": True},
    "invariant drafts": {"whole_pages": True, "drafts": 1},
}


def engine_of(pages=24, late=1, **limits) -> Engine:
    """Of pages of 4 tokens."""
    small = {"rows": 5, "budget": 16, "chunk": 7, "max_model_len": 64, "waiting": 20} | limits
    return Engine(Limits(**small), PagePool(pages, 4), late)


def random_operations(rng: random.Random, engine: Engine, operations: int):
    """Requests with shared beginnings, cancellations in every state, launches under changing budgets, results that come late."""
    beginnings = [[rng.randrange(VOCAB) for _ in range(24)] for _ in range(3)]
    for _ in range(operations):
        x = rng.random()
        if x < 0.2:
            tail = [rng.randrange(VOCAB) for _ in range(rng.randrange(5))]
            prompt = rng.choice(beginnings)[: rng.randrange(1, 25)] + tail
            options = {"stop_ids": (5,), "priority": rng.choice((0, 0, 1)), "salt": rng.choice("aab")}
            options |= {"prompt_logprobs": 1} if rng.random() < 0.1 else {}
            with contextlib.suppress(QueueFullError):
                engine.add(Request(str(len(engine.all)), prompt, rng.randrange(1, 30), **options))
        elif x < 0.25 and engine.all:
            engine.abort(str(rng.randrange(len(engine.all))))
        elif x < 0.6:
            engine.launch(rng.choice((None, None, 3, 9)))
        elif len(engine.flight) > engine.late:
            engine.receive()
        yield x


def check_answers(engine: Engine):
    """Whoever was not aborted has all its tokens, in order, up to a stop id or max_tokens."""
    for watched in engine.all.values():
        prompt, said = len(watched.request.prompt), watched.answer
        assert said == watched.alone.tokens[prompt : prompt + len(said)]
        if watched.end != "abort":
            stops = [i for i, token in enumerate(said) if token in watched.request.stop_ids]
            assert stops == ([len(said) - 1] if watched.end == "stop" else [])
            assert watched.end == "stop" or len(said) == watched.request.max_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_after_10000_random_operations_every_page_is_accounted_for_and_every_answer_is_whole(kind):
    engine = engine_of(**KINDS[kind])
    for _ in random_operations(random.Random(kind), engine, 10_000):
        engine.check_pages()
    engine.drain(5_000)
    engine.check_pages()
    check_answers(engine)
    assert engine.pool.held == 0

"""Requests with every setting of sampling, in slots; what is drawn for them, many times at once."""

import jax
import numpy as np

from deepseek_jax.model.id_sets import words
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampler import Rows, draw, empty_slots, of_request, put
from deepseek_jax.serving.sampling import Sampling
from tests.oracle.sampling import Case

V = 16
PROMPT, ANSWER = (3, 5, 5, 7, 11), (5, 2, 2, 2, 9, 0)
LOGITS = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)
LIKELIEST, SECOND, *_ = np.argsort(-LOGITS).tolist()
HOT = {"temperature": 1.0}
BIAS = {LIKELIEST: -2.0, 4: 3.0, 5: 2.0, 9: 1.0}
GRAMMAR = frozenset(range(16)) - {LIKELIEST, 1, 6}


def case(settings=None, answer=ANSWER, allowed=None, num_ids=None, **options) -> Case:
    request = Request("r", PROMPT, 100, Sampling(**(settings or {})), **options)
    return Case(request, answer, allowed, num_ids)


# Each setting alone, and combined.
CASES = {
    "greedy": case(),
    "temperature": case({"temperature": 0.7}),
    "hot": case({"temperature": 1.8}),
    "top_k": case({**HOT, "top_k": 3}),
    "top_p": case({**HOT, "top_p": 0.8}),
    "min_p": case({**HOT, "min_p": 0.1}),
    "repetition": case({**HOT, "repetition_penalty": 1.5}),
    "presence": case({**HOT, "presence_penalty": 1.2}),
    "frequency": case({**HOT, "frequency_penalty": 0.7}),
    "rewards": case({**HOT, "presence_penalty": -2, "frequency_penalty": -0.5, "repetition_penalty": 0.8}),
    "bias": case({**HOT, "logit_bias": BIAS}),
    "only": case({**HOT, "logit_bias": {4: 100, SECOND: 100}}),
    "grammar": case(HOT, allowed=GRAMMAR),
    "min_tokens": case(HOT, min_tokens=100, stop_ids=(LIKELIEST, 14)),
    "min_tokens are there": case(HOT, min_tokens=len(ANSWER), stop_ids=(LIKELIEST, 14)),
    "stops that are not banned": case(HOT, stop_ids=(LIKELIEST, 14)),
    "greedy with all": case(
        {"repetition_penalty": 1.5, "presence_penalty": 2, "logit_bias": BIAS, "top_p": 0.1},
        allowed=GRAMMAR,
        min_tokens=100,
        stop_ids=(SECOND,),
    ),
    "two cuts": case({"temperature": 1.5, "top_k": 9, "top_p": 0.9}),
    "three cuts": case({"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.15}),
    "penalties": case(
        {
            **HOT,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.4,
            "logit_bias": BIAS,
        }
    ),
    "all": case(
        {
            **{"temperature": 1.4, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "logit_bias": BIAS},
            **{"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        },
        allowed=GRAMMAR,
        min_tokens=100,
        stop_ids=(SECOND, 14),
    ),
    "grammar and min_tokens leave nothing": case(
        HOT, allowed=frozenset({2, 14}), min_tokens=100, stop_ids=(2, 14)
    ),
    "a grammar with nothing": case(HOT, allowed=frozenset()),
}
NAMES = list(CASES)


def any_case(rng: np.random.Generator, vocab: int) -> Case:
    """Each setting with probability 1/2, a temperature with 9/10."""
    some = lambda low, high: float(rng.uniform(low, high))  # noqa: E731
    ids = lambda n: tuple(rng.integers(0, vocab, n).tolist())  # noqa: E731
    settings = {
        "temperature": some(0.5, 2),
        "top_p": some(0.1, 1),
        "top_k": int(rng.integers(1, vocab)),
        "min_p": some(0, 0.2),
        "repetition_penalty": some(0.6, 1.6),
        "presence_penalty": some(-2, 2),
        "frequency_penalty": some(-2, 2),
        "logit_bias": dict(zip(ids(5), rng.uniform(-5, 5, 5).tolist(), strict=True)),
    }
    chosen = {
        name: value
        for name, value in settings.items()
        if rng.random() < (0.9 if name == "temperature" else 0.5)
    }
    answer = ids(rng.integers(0, 30))
    allowed = frozenset(ids(vocab // 2)) if rng.random() < 0.5 else None
    options = {"stop_ids": ids(3), "min_tokens": int(rng.integers(0, 30))}
    return Case(Request("r", ids(9), 100, Sampling(**chosen), **options), answer, allowed, vocab - 3)


jit_put = jax.jit(put, donate_argnums=0)


def draw_rows(
    slots, slot_b, logits_bv, position_b, counted_b, mask_bw=None, num_ids=None, masked_b=None, most=None
):
    return draw(slots, Rows(slot_b, position_b, counted_b, mask_bw, num_ids, masked_b, most), logits_bv)


jit_draw = jax.jit(draw_rows, static_argnames="most")


def slots_of(cases, places=None, slots=None, vocab=V):
    """The slots in which the cases lie, the i-th in places[i]."""
    state = empty_slots(slots or len(cases), vocab)
    for i, one in zip(places or range(len(cases)), cases, strict=True):
        state = jit_put(state, i, of_request(one.request, one.answer, vocab))
    return state


def bits(cases, vocab=V) -> np.ndarray:
    out = np.zeros((len(cases), 32 * words(vocab)), bool)
    for row, one in zip(out, cases, strict=True):
        row[sorted(range(vocab) if one.allowed is None else one.allowed)] = True
    return np.packbits(out, axis=-1, bitorder="little").view("<u4")


def rows_of(cases, num_ids=None, vocab=V) -> Rows:
    """The next token of each case, in the slot of its place."""
    position = np.array([len(one.request.prompt) + len(one.answer) for one in cases], np.int32)
    slot = np.arange(len(cases), dtype=np.int32)
    return Rows(slot, position, np.ones(len(cases), bool), bits(cases, vocab), num_ids)


def draws(cases, logits_v, n: int, most):
    """n draws of each case, one after the other, in one call: at n positions, with one seed.

    Positions say how many tokens are there; here all n of a case are before its `min_tokens`, or none is.
    """
    slots = slots_of(cases, vocab=len(logits_v))
    early = [len(one.answer) < one.request.min_tokens for one in cases]
    slots = slots._replace(free_from_s=np.where(early, 2**30, 0).astype(np.int32))
    rows = jax.tree.map(lambda x: np.repeat(x, n, axis=0), rows_of(cases, vocab=len(logits_v)))
    position = rows.position_b + np.tile(np.arange(n, dtype=np.int32), len(cases))
    logits = np.broadcast_to(logits_v, (len(position), len(logits_v)))
    _, drawn = jit_draw(slots, rows.slot_b, logits, position, rows.counted_b, rows.mask_bw, most=most)
    return [jax.tree.map(lambda x, i=i: np.asarray(x)[i * n : i * n + n], drawn) for i in range(len(cases))]

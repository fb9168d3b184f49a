"""Speculative decoding gives the text of plain decoding, greedy or sampled.

Drafts and acceptances of greedy rows are recomputed from a full forward pass over the finished text.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference import speculative
from deepseek_jax.inference.batch import Request
from deepseek_jax.inference.driver import complete
from deepseek_jax.inference.generate import generate, plain
from deepseek_jax.inference.sampling import Sampling, keys_at, row_sampling, sample
from deepseek_jax.inference.speculative import Stats, check_speculative
from deepseek_jax.model.modules import DeepSeekV3
from tests.oracle.tiny import V3, mostly_agreeing

CFG = dataclasses.replace(V3, num_hidden_layers=2, max_position_embeddings=128)  # two MTP modules
PROMPTS = [[5, 61, 7], [3, 9, 44, 10, 2, 8, 30, 31, 32], [66], list(range(20, 40))]
NEW = 13


@jax.jit
def _full_forward(params, bias, tokens):
    logits, aux = DeepSeekV3(CFG).apply({"params": params}, tokens, balance_bias=bias)
    return logits.argmax(-1), aux.mtp[0].argmax(-1)


def replay(prompt, continuation, drafts, new_tokens, stop_ids):
    """(drafted, accepted) of one row: the algorithm by hand, on a continuation that is already known.

    `drafts[i]` is what the first MTP module says at position i of the text for position i + 2.
    """
    count, drafted, accepted = 1, 0, 0
    while count < new_tokens and continuation[count - 1] not in stop_ids:
        agree = drafts[len(prompt) + count - 2] == continuation[count]
        drafted, accepted = drafted + 1, accepted + agree
        count += 2 if agree and continuation[count] not in stop_ids else 1
    return np.array([drafted, accepted])


def up_to(row, stop_ids):
    return list(itertools.takewhile(lambda token: token not in stop_ids, row))


def generate_speculative(params, cfg, prompts, max_new_tokens, *, balance_bias=None, **options):
    """(new tokens of each prompt, statistics of the drafts)"""
    request = Request(prompts, max_new_tokens, **options)
    rows, state = complete(speculative.speculative(params, cfg, balance_bias), cfg, request)
    return [row.tokens for row in rows], speculative.stats(state)


class Greedy:
    """Plain greedy text of a model for PROMPTS, and its drafts by the full forward pass."""

    def __init__(self, params, bias):
        self.params, self.bias = params, bias
        self.plain = generate(params, CFG, PROMPTS, NEW + 1, balance_bias=bias)
        tokens = np.zeros((len(PROMPTS), 40), np.int32)
        for row, prompt, out in zip(tokens, PROMPTS, self.plain, strict=True):
            row[: len(prompt) + len(out)] = prompt + out
        choices, drafts = _full_forward(params, bias, tokens)
        self.choices, self.drafts = np.asarray(choices), np.asarray(drafts)

    def check(self, new_tokens: int, stop_ids: tuple[int, ...] = ()) -> Stats:
        rows, got = generate_speculative(
            self.params, CFG, PROMPTS, new_tokens, balance_bias=self.bias, stop_ids=stop_ids
        )
        assert rows == [up_to(row[:new_tokens], stop_ids) for row in self.plain]
        parts = [
            replay(prompt, row, drafts, new_tokens, stop_ids)
            for prompt, row, drafts in zip(PROMPTS, self.plain, self.drafts, strict=True)
        ]
        assert (got.drafted, got.accepted) == tuple(np.sum(parts, axis=0))
        self.steps = [int(drafted) for drafted, _ in parts]
        return got


@pytest.fixture(scope="module")
def partly():
    return Greedy(*mostly_agreeing(CFG, 1, 0.1))


def test_the_oracle_is_the_model(partly):
    for prompt, row, choices in zip(PROMPTS, partly.plain, partly.choices, strict=True):
        assert row == choices[len(prompt) - 1 : len(prompt) + NEW].tolist()


@pytest.mark.parametrize(("seed", "share"), [(0, 0.5), (2, 0.1), (3, 0.3)])
def test_greedy_equals_plain_greedy(seed, share):
    greedy = Greedy(*mostly_agreeing(CFG, seed, share))
    got = greedy.check(NEW)
    assert 0 < got.accepted < got.drafted
    assert len({tuple(row) for row in greedy.plain}) == len(PROMPTS)


def test_rows_advance_at_their_own_pace(partly):
    partly.check(NEW)
    assert len(set(partly.steps)) > 2  # else the slots of the rows were never apart


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_few_tokens(partly, new_tokens):
    assert partly.check(new_tokens).drafted == len(PROMPTS) * (new_tokens - 1)


def test_stop_tokens_end_rows_where_plain_greedy_ends_them(partly):
    emitted = [token for row in partly.plain for token in row[1:NEW]]
    chosen = dict.fromkeys(emitted)  # each token once, in order
    assert len(chosen) > 4
    for token in chosen:
        partly.check(NEW, (token,))


def test_a_module_that_always_agrees_halves_the_steps():
    got = Greedy(*mostly_agreeing(CFG, 0, 0.0)).check(NEW)
    steps = (NEW - 1) // 2  # the first token comes from the prompt, then two per step
    assert got == Stats(drafted=steps * len(PROMPTS), accepted=steps * len(PROMPTS))
    assert (got.acceptance, got.tokens_per_step) == (1.0, 2.0)


def test_stats():
    assert Stats(8, 6).acceptance == 0.75 and Stats(8, 6).tokens_per_step == 1.75
    assert Stats(0, 0).acceptance == 0.0 and Stats(0, 0).tokens_per_step == 1.0


def test_a_model_without_mtp_module_is_refused():
    cfg = dataclasses.replace(CFG, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 0"):
        check_speculative(cfg)


# --- sampling ----------------------------------------------------------------------------------------------

HOT, NUCLEUS = Sampling(1.0), Sampling(1.3, 0.9)
BEST, PENALISED = Sampling(1.2, top_k=4, min_p=0.3), Sampling(0.7, repetition_penalty=1.5)


@pytest.mark.parametrize("sampling", [HOT, NUCLEUS, BEST, PENALISED, Sampling(repetition_penalty=2.0)])
def test_drafts_change_no_token(partly, sampling):
    """What is drawn, where it stops, and log-probabilities, under a seed: float32 sums of one or two tokens differ by 1e-6."""
    model = partly.params, CFG, partly.bias
    options = {"sampling": sampling, "seed": 5, "num_ids": 60}
    stop = generate(*model[:2], PROMPTS, NEW, balance_bias=partly.bias, **options)[0][4]
    request = Request(PROMPTS * 8, NEW, stop_ids=(stop,), **options)
    want, _ = complete(plain(*model), CFG, request)
    got, state = complete(speculative.speculative(*model), CFG, request)
    assert [(row.tokens, row.finish_reason) for row in got] == [
        (row.tokens, row.finish_reason) for row in want
    ]
    assert {row.finish_reason for row in got} == {"stop", "length"}
    for row, other in zip(got, want, strict=True):
        np.testing.assert_allclose(row.logprobs, other.logprobs, atol=1e-4)
        np.testing.assert_allclose(row.sampled_logprobs, other.sampled_logprobs, atol=1e-4)
    got = speculative.stats(state)
    assert 0.1 < got.acceptance < 0.95


def test_greedy_and_sampled_settings_share_a_program(partly):
    options = {"balance_bias": partly.bias}
    generate_speculative(partly.params, CFG, PROMPTS, 4, **options)
    before = speculative._advance._cache_size()
    generate_speculative(
        partly.params, CFG, PROMPTS, 2, sampling=BEST, seed=[1, 2, 3, 4], stop_ids=[4], **options
    )
    assert speculative._advance._cache_size() == before


P = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
Q = np.array([0.1, 0.5, 0.2, 0.0, 0.2])
N = 20_000


@pytest.mark.parametrize(("p", "q"), [(P, Q), (Q, P), (P, 0.9 * P + 0.1 * Q), (P, P)])
def test_draws_by_one_key_agree_as_often_as_coupled_exponentials(p, q):
    """Both take token i if its exponential is the first at the rates p and q: sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    rows = row_sampling(HOT, 3, N)
    key_b = keys_at(rows, jnp.zeros(N, jnp.int32))
    with np.errstate(divide="ignore"):
        logits = [jnp.broadcast_to(jnp.asarray(np.log(x), jnp.float32), (N, 5)) for x in (p, q)]
    drawn = [np.asarray(jax.jit(sample)(key_b, x, rows)[0]) for x in logits]
    both = np.flatnonzero((p > 0) & (q > 0))
    rate = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in both)
    apart = np.abs(p - q).sum() / 2
    assert (1 - apart) / (1 + apart) <= rate + 1e-12 <= 1 - apart + 2e-12
    assert abs((drawn[0] == drawn[1]).mean() - rate) <= 5 * np.sqrt(rate * (1 - rate) / N)

"""Drafts in the batch: what comes out is what comes out without them, greedy or sampled, and the module's latents are whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax

from deepseek_jax.model.decoding import prepare
from deepseek_jax.model.layers import embed
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.mtp import mtp_latents
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.transformer import forward
from deepseek_jax.serving import drafting, one_device
from deepseek_jax.serving.drafting import MEMORY, PROBE, Economy, check_drafts
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.one_device import OneDevice
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.pace import Pace
from deepseek_jax.serving.programs import Weights
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import Sampling
from tests.oracle.tiny import rel
from tests.serving import routed
from tests.serving.drafting_requests import CFG, NEW, PAGES, PROMPTS, SIZES, mixed, model
from tests.serving.tiny_engine import run


@functools.cache
def device() -> OneDevice:
    """With programs that draft, and without; its pages hold whatever earlier tests left."""
    made = OneDevice(CFG, SIZES, PAGES, drafts=True)
    params, bias = model()
    made.weights = Weights(prepare(params, CFG), bias, 60)
    for _ in made.warm_up():
        pass
    return made


class Scripted(Economy):
    """Drafts in the steps of a list, which comes again and again."""

    def __init__(self, script):
        super().__init__(Pace())
        self.script, self.step = script, 0

    def drafts(self, rows):
        self.step += 1
        return self.script[self.step % len(self.script)]


def engine(*script: bool) -> Engine:
    """Drafts in the steps of `script`; by default in all."""
    made = Engine(
        device(), Options(rows=4, max_model_len=256, chunk=64, waiting=1000, stall=1e9, drafts=True)
    )
    if script:
        made._economy = Scripted(script)
    return made


def test_routes_with_drafts():
    """Of the token before each one drawn, whether a draft was accepted, refused or not made."""
    made = engine(True, False, True)
    got = routed.run(made, requests(routes=True))
    assert 0 < made.stats.accepted < made.stats.drafted
    params, bias = model()
    routed.assert_same(got, params, CFG, bias)


def requests(prompts=PROMPTS, new=NEW, **options):
    return [Request(str(i), prompt, new, **options) for i, prompt in enumerate(prompts)]


def ids(out):
    return {name: [token.id for token in row] for name, row in out.items()}


@functools.cache
def greedy():
    """Without drafts, each prompt for itself, from no cache; `test_engine.py` has the engine against `generate`."""
    return {i: row for one in requests() for i, row in ids(run(engine(False), [one])).items()}


@pytest.mark.parametrize("script", [(True,), (True, False, False)])
def test_greedy_text_is_that_without_drafts(script):
    """With fewer pages than sequences need, chunks, shared beginnings, and steps without drafts between."""
    made = engine(*script)
    assert ids(run(made, requests())) == greedy()
    got = made.stats
    assert 0.2 * got.drafts < got.accepted < 0.95 * got.drafts and got.drafts == got.drafted
    assert got.preemptions and got.generated == NEW * len(PROMPTS)
    pool = made.schedulers[0].pool
    assert (pool.held, pool.free + pool.cached) == (0, pool.pages)


def test_a_warm_prefix_cache_changes_neither_text_nor_acceptance():
    """Two prompts that differ behind a page: the module's latent of the page's last token is another for each."""

    def one(made, i):
        before = dataclasses.replace(made.stats)
        out = run(made, [Request("a", PROMPTS[i], NEW)])
        assert ids(out) == {"a": greedy()[str(i)]}
        return tuple(
            getattr(made.stats, x) - getattr(before, x) for x in ("drafts", "accepted", "cache_hits")
        )

    cold = [one(engine(), i) for i in (1, 2)]
    assert [hits for *_, hits in cold] == [0, 0]
    made = engine()
    assert [one(made, i) for i in (1, 2)] == cold
    assert [one(made, i) for i in (1, 2)] == [(*counts, 64) for *counts, _ in cold]


def test_the_latents_of_the_module_are_whole():
    """After chunks and steps of both kinds, of every token but the last in pages: those of a full forward pass."""
    params, bias = model()
    made, tokens = engine(True, False, True, True, False), list(PROMPTS[3])
    made.submit(Request("a", tokens, 60))
    while len(tokens) < len(PROMPTS[3]) + 30:
        tokens += [token.id for update in made.step() for token in update.tokens]
    running = made.schedulers[0].running[0]
    n = len(tokens) - 2  # the last one is not in pages, that before it waits for the next step
    x = jnp.asarray([tokens])
    h, _ = forward(params, CFG, Inputs(x), balance_bias=bias, layout=single_device(), mtp=False)
    p = jax.tree.map(lambda w: w[0], params["mtp"])
    e = embed(params["embed"], CFG, x[:, 1:])
    want = mtp_latents(p, CFG, h[:, :-1], e, rope_table(CFG, jnp.arange(x.shape[1] - 1)[None]))
    pages = device()._state.pages_lpsw[CFG.num_hidden_layers]
    got = np.asarray(pages)[np.asarray(running.pages)].reshape(-1, pages.shape[-1])
    assert rel(got[:n], np.concatenate(want, axis=-1)[0, :n]) < 1e-4
    made.abort("a")
    while made.has_work:
        made.step()


def test_stop_ids_and_lengths_inside_a_pair():
    text = greedy()["0"]
    made = engine()
    wanted = [Request(f"stop{i}", PROMPTS[0], NEW, stop_ids=(text[i],)) for i in range(8)]
    wanted += [Request(f"new{n}", PROMPTS[0], n) for n in range(1, 9)]
    out = ids(run(made, wanted))
    for i in range(8):
        assert out[f"stop{i}"] == text[: text.index(text[i]) + 1]
        assert out[f"new{i + 1}"] == text[: i + 1]
    assert made.stats.accepted


def test_drafts_change_nothing_that_is_drawn():
    """Alone or beside others, in steps with drafts, without, or by turns: tokens, and their log-probabilities up to sums of
    float32 in another order."""
    plain = run(engine(False), mixed())
    assert ids(plain)["even"] == [token - token % 2 for token in ids(plain)["even"]]
    assert len(plain["least"]) >= 7
    made = engine()
    drafted = run(made, mixed())
    assert 0.1 < made.stats.accepted / made.stats.drafts < 0.95
    assert ids(drafted) == ids(plain)
    for row, other in zip(drafted.values(), plain.values(), strict=True):
        for name in ("logprob", "sampled_logprob"):
            got, want = ([getattr(token, name) for token in tokens] for tokens in (row, other))
            np.testing.assert_allclose(got, want, atol=1e-4)
        assert [[i for i, _ in token.top] for token in row] == [[i for i, _ in token.top] for token in other]
    made = engine(True, False)
    apart = {name: row for request in mixed()[::-1] for name, row in run(made, [request]).items()}
    assert ids(apart) == {name: ids(plain)[name] for name in apart}


# --- the distribution --------------------------------------------------------------------------------------------

SEEDS, K = 300, 3


def p_value_of_texts() -> float:
    """Chi-square of the three first tokens of many seeds, against the model's own probabilities as each step said them."""
    out = run(
        engine(),
        [Request(str(i), [1, 2, 3], 3, Sampling(1.5, top_k=K), seed=i, logprobs=K) for i in range(SEEDS)],
    )
    nexts: dict[tuple, dict] = {}
    for row in out.values():
        for n, token in enumerate(row):
            known, logprobs = zip(*token.top, strict=True)
            nexts[tuple(t.id for t in row[:n])] = dict(
                zip(known, softmax(np.array(logprobs) / 1.5), strict=True)
            )
    texts = [tuple(token.id for token in row) for row in out.values()]
    expected = {
        (a, b, c): nexts[()][a] * nexts[a,][b] * p
        for a in nexts[()]
        for b in nexts.get((a,), ())
        for c, p in nexts.get((a, b), {}).items()
    }
    if any(text not in expected for text in texts):
        return 0.0
    want = np.array([*expected.values()]) * SEEDS
    counts = np.array([texts.count(text) for text in expected])
    rare = want < 5  # taken together
    cells = np.where(rare, 0, 1 + np.arange(len(want)))
    want, counts = (np.bincount(cells, x) for x in (want, counts))
    counts, want = counts[want > 0], want[want > 0]
    return float(stats.chisquare(counts, want * SEEDS / want.sum()).pvalue)


def test_texts_follow_the_models_distribution_and_a_broken_rule_is_seen(monkeypatch):
    assert p_value_of_texts() > 1e-3
    monkeypatch.setattr(drafting, "agrees", lambda guess_r, token_r: jnp.ones(guess_r.shape, bool))
    one_device._decode.clear_cache()
    assert p_value_of_texts() < 1e-5
    one_device._decode.clear_cache()


# --- when drafts pay ---------------------------------------------------------------------------------------------


def economy(one, two, always=False):
    """Seconds of steps without and with drafts, by rows."""
    seconds = {("decode", rows): s for rows, s in one.items()} | {
        ("drafts", rows): s for rows, s in two.items()
    }
    return Economy(Pace(seconds), always)


def test_drafts_where_they_pay():
    """1.6 tokens in 1.5 times the time pay, in 1.7 times not; then a step now and then tries."""
    made = economy({1: 1.0, 4: 1.0}, {1: 1.5, 4: 1.7})
    assert made.drafts(4)  # until the acceptance is known
    for _ in range(40):
        made.heard(20, 12)
    assert made.acceptance == pytest.approx(0.6, abs=0.01)
    assert all(made.drafts(1) for _ in range(9))
    steps = [made.drafts(4) for _ in range(1000)]
    assert sum(steps) == int(1000 / (PROBE * 1.7 + 1)) and not steps[0]
    assert sum(steps) * (1.7 - 1) < 1000 / PROBE
    for _ in range(3 * MEMORY):
        made.heard(1, 1)
    assert made.drafts(4)
    assert economy({8: 1.0}, {8: 9.0}, always=True).drafts(8)


def test_times_of_turns_correct_those_of_a_busy_start():
    """A program whose start was disturbed is found out by few tries; turns that are disturbed later change little."""
    pace = Pace({("decode", 1): 1.0, ("drafts", 1): 8.0})
    made = Economy(pace)
    for _ in range(8):
        pace.took(("drafts", 1), 1.5)
    assert made.cost(1) == pytest.approx(1.5, abs=0.1) and made.drafts(1)
    for seconds in (1.0, 50.0, 1.0, 50.0, 1.0, 1.0):
        pace.took(("decode", 1), seconds)
    assert made.cost(1) == pytest.approx(1.5, abs=0.1)


def test_which_engines_draft():
    none = dataclasses.replace(CFG, num_nextn_predict_layers=0)
    assert check_drafts(CFG, True, True) and check_drafts(CFG, "auto", False)
    assert not check_drafts(CFG, "auto", True) and not check_drafts(none, "auto", False)
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 0"):
        check_drafts(none, True, False)

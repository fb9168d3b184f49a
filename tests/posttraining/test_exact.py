"""Exact mode: what the trainer takes for the log-probabilities of samples are the sampler's bits."""

import jax
import numpy as np
import pytest

from deepseek_jax.inference.scoring import logprobs
from deepseek_jax.posttraining.exact import exact_logprobs
from deepseek_jax.posttraining.rollouts import Sample, Sampling
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.request import Request
from tests.oracle.tiny import mostly_agreeing
from tests.posttraining.samples import drawn
from tests.serving import invariant

CFG = invariant.CFG
RNG = np.random.default_rng(0)
BEGIN = RNG.integers(0, CFG.vocab_size, 128).tolist()
# Two prompts that share two pages, one that ends at a page, short ones.
PROMPTS = [[*BEGIN, 5, 6, 7], [*BEGIN, 9], RNG.integers(0, CFG.vocab_size, 64).tolist(), [3], [8, 1, 4, 1]]
STOP = 2


@pytest.mark.parametrize(
    "sampling",
    [Sampling(40, (STOP,), 0.8), Sampling(40, (STOP,), 1.0, top_p=0.8, kept=True)],
    ids=["temperature", "nucleus"],
)
def test_bits_are_those_of_the_sampler(sampling):
    """Together and in another order, and some alone, from the cache and from none."""
    made = invariant.engine(drafts=False)
    samples = drawn(made, PROMPTS, sampling)
    assert len({len(s.tokens) for s in samples}) > 4 and made.stats.cache_hits
    order = np.random.default_rng(1).permutation(len(samples))
    again = exact_logprobs(made, PROMPTS, [samples[i] for i in order], sampling)
    for i, got in zip(order, again, strict=True):
        np.testing.assert_array_equal(got, samples[i].logprobs)
    fresh = invariant.engine(drafts=False)
    for sample in samples[::5]:
        (got,) = exact_logprobs(fresh, PROMPTS, [sample], sampling)
        np.testing.assert_array_equal(got, sample.logprobs)


def test_other_weights_and_the_distance_of_the_trainers_own_pass():
    """After other weights came, values are theirs, to 1e-4 of the trainer's whole pass in float32: so near is the normal mode."""
    sampling, made = Sampling(40, (STOP,), 1.0), invariant.engine(drafts=False)
    samples = drawn(made, PROMPTS, sampling)
    before = made.device.weights
    params, bias = jax.tree.map(jax.numpy.asarray, mostly_agreeing(CFG, 2, 0.4))
    made.load(before._replace(ready=invariant.prepare(params, CFG), bias_le=bias), 1)
    try:
        got = exact_logprobs(made, PROMPTS, samples, sampling)
        assert max(np.abs(x - s.logprobs).max() for x, s in zip(got, samples, strict=True)) > 0.1
        apart = 0.0
        for x, sample in zip(got, samples, strict=True):
            ids = [*PROMPTS[sample.prompt], *sample.tokens.tolist()]
            want = logprobs(params, CFG, ids, bias)[-len(x) :]
            apart = max(apart, np.abs(x - want).max())
        assert 0 < apart < 1e-4
    finally:
        made.load(before, 2)


def test_what_cannot_be_exact():
    made = invariant.engine(drafts=False)
    sample = Sample(0, np.int32([1]), np.float32([-1]), "length", 0)
    other = Engine(made.device, Options(rows=4, max_model_len=512, chunk=64))
    for engine, sampling, said in (
        (other, Sampling(4), "invariant=True and drafts=False, not invariant=False"),
        (made, Sampling(4, temperature=0), "greedy samples have no probabilities"),
        (made, Sampling(4, top_p=0.9), "top_p=0.9, top_k=0: other weights leave other ids"),
    ):
        with pytest.raises(ValueError, match=said):
            exact_logprobs(engine, PROMPTS, [sample], sampling)
    for answer, said in (([1, 99], "must be token ids below"), ([1, 2, 3], "must be as many")):
        with pytest.raises(ValueError, match=said):
            made.submit(Request("a", [1], 2, answer=answer))
    made.submit(Request("a", [1], 2, answer=[5, 5]))
    greedy = [token for _ in range(9) for update in made.step() for token in update.tokens]
    assert [token.id for token in greedy] == [5, 5]
    assert all(token.sampled_logprob in (0, -np.inf) for token in greedy)

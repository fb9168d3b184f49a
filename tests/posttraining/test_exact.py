"""Exact mode: what the trainer takes for the log-probabilities of samples are the sampler's bits."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import Config, DataConfig, TrainConfig
from deepseek_jax.inference.scoring import logprobs
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining.exact import exact_logprobs
from deepseek_jax.posttraining.grpo_loss import grpo_loss
from deepseek_jax.posttraining.logprobs import make_logprob_step
from deepseek_jax.posttraining.rollouts import Sample, Sampling
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.request import Request
from tests.oracle import model as oracle
from tests.oracle.tiny import checkpoint, mostly_agreeing
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
    routed = sample._replace(routes=np.zeros((1, 1, 3), np.int16), version=7)
    for engine, one, sampling, said in (
        (other, sample, Sampling(4), "invariant=True and drafts=False, not invariant=False"),
        (made, sample, Sampling(4, temperature=0), "greedy samples have no probabilities"),
        (made, sample, Sampling(4, top_p=0.9), "top_p=0.9, top_k=0: other weights leave other ids"),
        (made, routed, Sampling(4), r"samples of the weights \[7\] were routed by them"),
    ):
        with pytest.raises(ValueError, match=said):
            exact_logprobs(engine, PROMPTS, [one], sampling)
    for answer, said in (([1, 99], "must be token ids below"), ([1, 2, 3], "must be as many")):
        with pytest.raises(ValueError, match=said):
            made.submit(Request("a", [1], 2, answer=answer))
    made.submit(Request("a", [1], 2, answer=[5, 5]))
    greedy = [token for _ in range(9) for update in made.step() for token in update.tokens]
    assert [token.id for token in greedy] == [5, 5]
    assert all(token.sampled_logprob in (0, -np.inf) for token in greedy)


# --- the trainer's own pass ---------------------------------------------------------------------------------------


def batch_of(prompts, samples, w):
    """Rows of a prompt and an answer, and zeros behind."""
    b = len(samples)
    batch = {
        "tokens": np.zeros((b, w), np.int32),
        "loss_mask": np.zeros((b, w), bool),
        "sampler_logp": np.zeros((b, w), np.float32),
        "kept": np.zeros((b, w, samples[0].kept.shape[-1]), np.uint32),
        "padding": np.ones((b, w), bool),
    }
    for i, sample in enumerate(samples):
        begin = len(prompts[sample.prompt])
        at = slice(begin, begin + len(sample.tokens))
        batch["tokens"][i, : at.stop] = [*prompts[sample.prompt], *sample.tokens]
        batch["loss_mask"][i, at], batch["padding"][i, : at.stop] = True, False
        batch["sampler_logp"][i, at], batch["kept"][i, at] = sample.logprobs, sample.kept
    return batch


def test_the_ratio_is_one_with_the_kept_sets_and_without_them_their_mass():
    """At top-p 0.8, whose mass is the NumPy oracle's; in the normal mode, a token's distance is below 1e-4."""
    made, prompts, t = invariant.engine(drafts=False), PROMPTS[3:], 32
    samples = drawn(made, prompts, Sampling(24, (STOP,), 1.0, top_p=0.8, kept=True))
    batch, mask = (found := batch_of(prompts, samples, t + 1)), found["loss_mask"]
    cfg = Config(
        model=CFG,
        data=DataConfig(vocab_size=CFG.vocab_size, seq_len=t),
        train=TrainConfig(loss_chunk=64),
    )
    params, bias = mostly_agreeing(CFG, 1, 0.3)
    step = make_logprob_step(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))

    def metrics(kept):
        logp = jax.device_get(step(params, bias, batch | {"kept": kept})).logp
        a = np.ones(len(samples), np.float32)
        return jax.device_get(jax.jit(lambda x: grpo_loss(x, batch["sampler_logp"], None, a, mask)[1])(logp))

    got = metrics(batch["kept"])
    assert got["sampler_gap_max"] < 1e-4
    np.testing.assert_allclose(got["ratio"], 1, atol=1e-5)
    p = oracle.softmax(
        np.stack(oracle.forward(*checkpoint(CFG, params, bias), batch["tokens"][:, :-1]).logits)
    )
    bits = np.unpackbits(batch["kept"].view(np.uint8), axis=-1, bitorder="little")[..., : CFG.vocab_size]
    mass = (p * bits[:, 1:]).sum(-1)[mask[:, 1:]]
    assert mass.min() > 0.8 - 1e-4 and mass.mean() < 0.95
    np.testing.assert_allclose(metrics(0 * batch["kept"])["ratio"], mass.mean(), atol=1e-4)

"""The sampled distribution against its definition, against `transformers`' processors, and by chi-square."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deepseek_jax.inference.offline import seeds_of
from deepseek_jax.serving.sampling import (
    RowSampling,
    Sampling,
    filtered_logits,
    keys_at,
    log_prob,
    penalised,
    plain_numbers,
    sample,
)

# Exact binary fractions: cumulative sums meet top_p without rounding.
PROB = np.array([0.0625, 0.5, 0.125, 0.25, 0.0625])


def distribution(prob, sampling):
    """The distribution by its definition: the fewest most likely tokens with top_p together, renormalised."""
    scaled = prob ** (1 / sampling.temperature)
    scaled = scaled / scaled.sum()
    order = np.argsort(-scaled, kind="stable")  # of equally likely tokens, the lower ids first
    kept = order[: 1 + np.searchsorted(np.cumsum(scaled[order]), sampling.top_p - 1e-7)]
    out = np.zeros_like(scaled)
    out[kept] = scaled[kept] / scaled[kept].sum()
    return out


def row_sampling(sampling, seed, rows) -> RowSampling:
    """The same settings for all rows, each with a stream of its own, or with the seed that is given for it."""
    temperature, top_p, top_k, min_p, penalty = (jnp.full(rows, x) for x in plain_numbers(sampling))
    key_b = jax.vmap(jax.random.key)(jnp.array(seeds_of(seed, rows), jnp.uint32))
    return RowSampling(temperature, top_p, top_k, min_p, penalty, key_b)


def filtered(logits, sampling):
    return jax.jit(filtered_logits)(logits, row_sampling(sampling, 0, len(logits)))


def draw(logits, sampling, seed=0):
    """(tokens, log-probabilities) of one token per row."""
    rows = row_sampling(sampling, seed, len(logits))
    return jax.jit(sample)(keys_at(rows, jnp.zeros(len(logits), jnp.int32)), logits, rows)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.51, 0.75, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_filtered_distribution(top_p, temperature):
    sampling = Sampling(temperature, top_p)
    got = jax.nn.softmax(filtered(jnp.log(PROB)[None], sampling))[0]
    want = distribution(PROB, sampling)
    assert ((np.asarray(got) > 0) == (want > 0)).all()
    np.testing.assert_allclose(got, want, rtol=1e-5)  # float32: exp and log of five numbers


def test_nucleus_of_half_is_the_one_token_that_has_half():
    assert distribution(PROB, Sampling(1.0, 0.5)).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.1, 10), (0.995, 100), (0.3, 30), (0.001, 1), (1e-50, 1), (1.0, 100)]
)
def test_a_nucleus_cuts_through_equal_logits(top_p, kept):
    """As `transformers` and vLLM, which sort: the nucleus ends where top_p is reached, in the middle of a tie."""
    rows = jnp.stack([jnp.zeros(100), jnp.full(100, 7.5)])
    for keep in np.isfinite(filtered(rows, Sampling(1.0, top_p))):
        assert keep.sum() == kept and keep[:kept].all()
    warped = TopPLogitsWarper(top_p)(None, torch.zeros(1, 100))
    assert abs(int(torch.isfinite(warped).sum()) - kept) <= 1  # its float32 sums stop on either side of top_p
    clear = jnp.where(jnp.arange(100) == 60, 5.0, rows[0])  # one token above the tie is kept first
    assert np.isfinite(filtered(clear[None], Sampling(1.0, top_p)))[0, 60]


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 2e-38, 1e-40, 5e-324, 0.0])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_smallest_temperatures_are_greedy(temperature, top_p):
    logits = jnp.array([[0.0, 2.0, 1.0], [-3.0, -jnp.inf, -3.5], [1e-3, 0.0, 2e-3], [30.0, 80.0, -90.0]])
    got, _ = draw(jnp.tile(logits, (50, 1)), Sampling(temperature, top_p))
    assert got.tolist() == [1, 0, 2, 1] * 50


def test_the_largest_temperature_is_uniform():
    got = jax.nn.softmax(filtered(jnp.array([[80.0, -80.0, -jnp.inf]]), Sampling(1e300))[0])
    assert got.tolist() == [0.5, 0.5, 0.0]


# --- transformers as the oracle ----------------------------------------------------------------------------------

V = 500
SETTINGS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.7, top_k=1),
    Sampling(1.3, top_k=50),
    Sampling(1.0, top_k=10_000),
    Sampling(0.9, top_p=0.8),
    Sampling(1.0, min_p=0.05),
    Sampling(1.0, min_p=1.0),
    Sampling(2.0, top_p=0.9, top_k=40, min_p=0.02),
    Sampling(1.0, repetition_penalty=1.3),
    Sampling(1.0, repetition_penalty=0.6),
    Sampling(0.8, top_p=0.95, top_k=100, min_p=0.01, repetition_penalty=1.2),
    Sampling(0.0, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.5),
]


def one_batch(settings) -> RowSampling:
    """Settings of their own for each row."""
    rows = [row_sampling(sampling, 0, 1) for sampling in settings]
    return jax.tree.map(lambda *values: jnp.concatenate(values), *rows)


def by_transformers(logits_v, seen_n, sampling) -> np.ndarray:
    """Probabilities after the processors, in the order in which `transformers.generate` builds them."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    if sampling.temperature:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.temperature and sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.temperature and sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.temperature and sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    out = processors(torch.tensor(seen_n)[None], torch.tensor(logits_v)[None].double())[0]
    if not sampling.temperature:
        return np.eye(len(logits_v))[int(out.argmax())]
    return torch.softmax(out, -1).numpy()


@pytest.mark.parametrize("tied", [False, True])
def test_each_row_is_what_transformers_makes_of_it(tied):
    """Thirteen settings in one batch. With ties (logits in steps of 1/4) top-p ends in the middle of one, where the ids
    that stay are the sort's choice: there, what both keep."""
    rng = np.random.default_rng(3)
    logits = (3 * rng.standard_normal((len(SETTINGS), V))).astype(np.float32)
    logits = np.round(4 * logits) / 4 if tied else logits
    seen = rng.integers(0, V, (len(SETTINGS), 60))
    seen_bv = np.zeros(logits.shape, bool)
    np.put_along_axis(seen_bv, seen, True, axis=1)
    rows = one_batch(SETTINGS)
    got = jax.jit(lambda x, seen: filtered_logits(penalised(x, seen, rows), rows))(logits, seen_bv)
    got = np.asarray(jax.nn.softmax(got, axis=-1))
    for row, x, ids, sampling in zip(got, logits, seen, SETTINGS, strict=True):
        want = by_transformers(x, ids, sampling)
        if tied and sampling.top_p < 1:
            assert (row > 0).sum() == (want > 0).sum()
            want = np.sort(want)
            row = np.sort(row)
        assert ((row > 0) == (want > 0)).all(), sampling
        # Float32 logits up to 20 over temperatures from 0.7: rounding of 20 / 0.7 * 2^-24 in the exponent, and sums.
        np.testing.assert_allclose(row, want, rtol=2e-5, err_msg=str(sampling))


def test_top_k_keeps_what_ties_with_the_last_one():
    kept = np.isfinite(filtered(jnp.array([[1.0, 3.0, 2.0, 2.0, 0.0]]), Sampling(1.0, top_k=2)))
    assert kept[0].tolist() == [False, True, True, True, False]


def test_settings_of_other_rows_change_nothing():
    logits = jnp.asarray(np.random.default_rng(4).standard_normal((len(SETTINGS), V), np.float32))
    together = jax.jit(filtered_logits)(logits, one_batch(SETTINGS))
    for i in (1, 3, 5, 8):
        np.testing.assert_array_equal(together[i], filtered(logits[i][None], SETTINGS[i])[0])


def test_log_probability_of_what_was_drawn():
    """Under the distribution that is really sampled; certain where it is greedy."""
    logits = jnp.tile(jnp.log(PROB), (64, 1))
    tokens, got = draw(logits, Sampling(1.0, top_k=3))
    want = PROB / PROB[[1, 2, 3]].sum()
    assert set(np.asarray(tokens).tolist()) == {1, 2, 3}
    np.testing.assert_allclose(got, np.log(want)[np.asarray(tokens)], atol=1e-6)
    np.testing.assert_allclose(log_prob(logits, tokens), np.log(PROB)[np.asarray(tokens)], atol=1e-6)
    assert not np.asarray(draw(logits, Sampling())[1]).any()


def test_a_rows_draws_are_its_own():
    """One seed gives each row a stream; a seed of its own gives a row the first of that seed."""
    logits = jnp.zeros((4, 10_000))
    streams = np.asarray(draw(logits, Sampling(1.0), seed=7)[0])
    assert len(set(streams.tolist())) == 4
    assert np.asarray(draw(logits[:2], Sampling(1.0), seed=7)[0]).tolist() == streams[:2].tolist()
    first = [int(draw(logits[:1], Sampling(1.0), seed=seed)[0][0]) for seed in (3, 9, 7, 3)]
    assert draw(logits, Sampling(1.0), seed=[3, 9, 7, 3])[0].tolist() == first
    assert first[2] == streams[0] and first[0] == first[3]
    with pytest.raises(ValueError, match="2 seeds for 4 prompts"):
        draw(logits, Sampling(1.0), seed=[1, 2])


def test_any_integer_is_a_seed():
    for seed in (-1, 2**40 + 3, np.int64(5)):
        assert draw(jnp.zeros((1, 9)), Sampling(1.0), seed=seed)[0].shape == (1,)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.5, 0.8), Sampling(0.7, 0.9)])
def test_frequencies(sampling):
    """Pearson's chi-square of 20,000 draws stays below its 99.99% quantile (23.5 for four degrees)."""
    n, want = 20_000, distribution(PROB, sampling)
    draws, _ = draw(jnp.log(jnp.tile(PROB, (n, 1))), sampling, seed=5)
    count = np.bincount(draws, minlength=5)
    assert draws.dtype == jnp.int32
    assert count[want == 0].sum() == 0
    expected = n * want[want > 0]
    assert ((count[want > 0] - expected) ** 2 / expected).sum() < 23.5


def test_greedy_is_the_most_likely_token_per_row():
    logits = jnp.array([[0.0, 2.0, 1.0], [3.0, -jnp.inf, 3.0]])
    assert draw(logits, Sampling())[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1 must be finite and >= 0 \(0 is greedy\)"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"temperature": float("inf")}, "temperature=inf must be finite"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must lie in \(0, 1\]"),
        ({"top_p": float("nan")}, "top_p=nan must lie"),
        ({"top_k": -1}, r"top_k=-1 must be a whole number >= 0 \(0 keeps all\)"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
        ({"min_p": -0.1}, r"min_p=-0.1 must lie in \[0, 1\]"),
        ({"min_p": float("nan")}, "min_p=nan must lie"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0 must be finite and > 0 \(1 is none\)"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf must be finite"),
        ({"presence_penalty": 2.1}, r"presence_penalty=2.1 must lie in \[-2, 2\] \(0 is none\)"),
        ({"frequency_penalty": -3}, r"frequency_penalty=-3 must lie in \[-2, 2\]"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan must lie"),
        ({"presence_penalty": "1"}, "presence_penalty='1' must be a number"),
        ({"logit_bias": [1, 2]}, r"logit_bias=\[1, 2\] must map token ids to numbers"),
        ({"logit_bias": (1, 2)}, r"logit_bias=\(1, 2\) must map token ids to numbers"),
        ({"logit_bias": None}, "logit_bias=None must map token ids to numbers"),
        ({"logit_bias": {"a": 1}}, "logit_bias has the key 'a': give token ids"),
        ({"logit_bias": {-1: 1}}, "logit_bias has the key -1: give token ids"),
        ({"logit_bias": {5: 101}}, "logit_bias=101 of token 5 must be a number from -100 to 100"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias=nan of token 5 must be a number"),
        ({"logit_bias": {5: "1"}}, "logit_bias='1' of token 5 must be a number"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias has 1025 ids: give at most 1024"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_a_bias_is_a_mapping_that_does_not_change():
    """Settings are compared, hashed and copied; the mapping is that of the call, whatever happens to it later."""
    bias = {7: -100, np.int64(3): np.float32(0.5)}
    sampling = Sampling(1.0, logit_bias=bias)
    bias[9] = 1
    assert dict(sampling.logit_bias) == {3: 0.5, 7: -100.0}
    assert sampling == dataclasses.replace(sampling) == Sampling(1.0, logit_bias={3: 0.5, 7: -100})
    assert len({sampling, Sampling(1.0), Sampling(1.0, logit_bias={})}) == 2


@pytest.mark.parametrize("penalty", [1e300, 1e-300])
def test_penalties_that_float32_does_not_hold_give_numbers(penalty):
    sampling = Sampling(1.0, repetition_penalty=penalty)
    rows = row_sampling(sampling, 0, 1)
    logits = jnp.array([[0.0, 3.0, -2.0, 1.0]])
    got = filtered_logits(penalised(logits, jnp.array([[True, True, True, False]]), rows), rows)
    assert got[0].tolist().index(0.0) == (3 if penalty > 1 else 1) and not jnp.isnan(got).any()

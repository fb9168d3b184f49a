"""The sampled distribution: temperature and nucleus, exactly and by chi-square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from deepseek_jax.inference.sampling import Sampling, filtered_logits, sample

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


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.51, 0.75, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_filtered_distribution(top_p, temperature):
    sampling = Sampling(temperature, top_p)
    got = jax.nn.softmax(filtered_logits(jnp.log(PROB)[None], sampling))[0]
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
    for keep in np.isfinite(filtered_logits(rows, Sampling(1.0, top_p))):
        assert keep.sum() == kept and keep[:kept].all()
    warped = TopPLogitsWarper(top_p)(None, torch.zeros(1, 100))
    assert abs(int(torch.isfinite(warped).sum()) - kept) <= 1  # its float32 sums stop on either side of top_p
    clear = jnp.where(jnp.arange(100) == 60, 5.0, rows[0])  # one token above the tie is kept first
    assert np.isfinite(filtered_logits(clear, Sampling(1.0, top_p)))[60]


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 2e-38, 1e-40, 5e-324, 0.0])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_smallest_temperatures_are_greedy(temperature, top_p):
    logits = jnp.array([[0.0, 2.0, 1.0], [-3.0, -jnp.inf, -3.5], [1e-3, 0.0, 2e-3], [30.0, 80.0, -90.0]])
    got = sample(jax.random.key(0), jnp.tile(logits, (50, 1)), Sampling(temperature, top_p))
    assert got.tolist() == [1, 0, 2, 1] * 50


def test_the_largest_temperature_is_uniform():
    got = jax.nn.softmax(filtered_logits(jnp.array([80.0, -80.0, -jnp.inf]), Sampling(1e300)))
    assert got.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.5, 0.8), Sampling(0.7, 0.9)])
def test_frequencies(sampling):
    """Pearson's chi-square of 20,000 draws stays below its 99.99% quantile (23.5 for four degrees)."""
    n, want = 20_000, distribution(PROB, sampling)
    draws = sample(jax.random.key(5), jnp.log(jnp.tile(PROB, (n, 1))), sampling)
    count = np.bincount(draws, minlength=5)
    assert draws.dtype == jnp.int32
    assert count[want == 0].sum() == 0
    expected = n * want[want > 0]
    assert ((count[want > 0] - expected) ** 2 / expected).sum() < 23.5


def test_greedy_is_the_most_likely_token_per_row():
    logits = jnp.array([[0.0, 2.0, 1.0], [3.0, -jnp.inf, 3.0]])
    assert sample(jax.random.key(0), logits, Sampling()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1 must be finite and >= 0 \(0 is greedy\)"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"temperature": float("inf")}, "temperature=inf must be finite"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must lie in \(0, 1\]"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)

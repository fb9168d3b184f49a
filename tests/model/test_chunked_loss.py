"""The loss in chunks against log-softmax over everything at once, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.id_sets import packed
from deepseek_jax.model.loss import token_logprobs, weighted_nll

N, D, V = 37, 11, 23
RNG = np.random.default_rng(0)
H = RNG.standard_normal((N, D)).astype(np.float32)
W = RNG.standard_normal((D, V)).astype(np.float32)
LABELS = RNG.integers(0, V, N).astype(np.int32)
WEIGHTS = np.where(RNG.uniform(size=N) < 0.3, 0, RNG.uniform(0.5, 2, N)).astype(np.float32)


def plain(h, w):
    log_p = jax.nn.log_softmax(h @ w)
    return -(jnp.take_along_axis(log_p, LABELS[:, None], -1)[:, 0] * WEIGHTS).sum()


@pytest.mark.parametrize("chunk", [1, 8, N, 64])
def test_value_and_gradients(chunk):
    def chunked(h, w):
        return weighted_nll(h, w, LABELS, WEIGHTS, chunk)

    np.testing.assert_allclose(chunked(H, W), plain(H, W), rtol=1e-5)
    got = jax.jit(jax.value_and_grad(lambda h, w: 3.0 * chunked(h, w), (0, 1)))(H, W)
    want = jax.value_and_grad(lambda h, w: 3.0 * plain(h, w), (0, 1))(H, W)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for g, w in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_huge_logits_do_not_overflow():
    value, grad = jax.value_and_grad(lambda h: weighted_nll(h, W, LABELS, WEIGHTS, 8))(1e4 * H)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_whole_logits_never_exist():
    """No buffer of n x v float32 in the traced program, forward and backward."""
    n, v = 640, 999
    h, w = jnp.zeros((n, D)), jnp.zeros((D, v))
    labels, weights = jnp.zeros(n, jnp.int32), jnp.ones(n)
    step = jax.grad(lambda h, w: weighted_nll(h, w, labels, weights, 64), (0, 1))
    text = jax.jit(step).lower(h, w).as_text()
    assert f"64x{v}xf32" in text
    assert f"{n}x{v}x" not in text and f"10x64x{v}x" not in text


# --- each token's own ---------------------------------------------------------------------------------------------

ADVANTAGE = RNG.standard_normal(N)
OLD = 0.1 * RNG.standard_normal(N)  # of the policy that sampled, beside log p of H and W


def log_p(h, w):
    """In float64."""
    logits = h.astype(np.float64) @ w.astype(np.float64)
    largest = logits.max(-1, keepdims=True)
    return (logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True)))[np.arange(N), LABELS]


BEFORE = log_p(H, W) + OLD


def clipped(xp, logp):
    """A policy's clipped objective: no linear function of log-probabilities, and flat where it clips."""
    ratio = xp.exp(logp - BEFORE.astype(logp.dtype))
    advantage = ADVANTAGE.astype(logp.dtype)
    return xp.minimum(ratio * advantage, xp.clip(ratio, 0.95, 1.05) * advantage).sum()


@pytest.mark.parametrize("chunk", [1, 8, N, 64])
def test_log_probabilities_and_a_function_of_them(chunk):
    """Gradients against differences of the float64 objective along random directions."""
    got = token_logprobs(H, W, LABELS, chunk).logp
    assert got.shape == (N,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, log_p(H, W), rtol=1e-5)
    ratio = np.exp(-OLD)
    edges = np.abs(ratio - 0.95), np.abs(ratio - 1.05)
    assert min(map(np.min, edges)) > 1e-4 and 5 < ((ratio > 0.95) & (ratio < 1.05)).sum() < N - 5
    run = jax.value_and_grad(lambda h, w: clipped(jnp, token_logprobs(h, w, LABELS, chunk).logp), (0, 1))
    value, (dh, dw) = jax.jit(run)(H, W)
    np.testing.assert_allclose(value, clipped(np, log_p(H, W)), rtol=1e-5)
    rng, step = np.random.default_rng(1), 1e-6  # moves a ratio by less than its distance to an edge
    for _ in range(5):
        h, w = rng.standard_normal(H.shape), rng.standard_normal(W.shape)
        ahead, back = (clipped(np, log_p(H + s * h, W + s * w)) for s in (step, -step))
        slope = (np.vdot(dh, h) + np.vdot(dw, w)).item()
        # Float32 sums of N x V terms on one side, differences of float64 over 2e-6 on the other.
        assert abs(slope - (ahead - back) / (2 * step)) < 1e-4 * np.sqrt(np.sum(dh**2) + np.sum(dw**2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_weighted_sum_is_that_of_the_log_probabilities(dtype):
    """Bitwise, gradients too: both form them from the same weights."""
    h = jnp.asarray(H, dtype)

    def grads(of):
        return jax.jit(jax.grad(of, (0, 1)))(h, W)

    got = grads(lambda h, w: -(WEIGHTS * token_logprobs(h, w, LABELS, 8).logp).sum())
    want = grads(lambda h, w: weighted_nll(h, w, LABELS, WEIGHTS, 8))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# One id, some, all but the label's likeliest rivals, none (which stands for all).
KEPT = RNG.uniform(size=(N, V)) < RNG.choice([0.0, 0.3, 0.9], N)[:, None]
KEPT[np.arange(N), LABELS] |= KEPT.any(-1)
TEMPERATURE = 0.7


def drawn_from(h, w):
    """(log-probabilities, entropies) of what tokens are drawn from, in float64."""
    logits = h.astype(np.float64) @ w.astype(np.float64) / TEMPERATURE
    logits = np.where(KEPT | ~KEPT.any(-1, keepdims=True), logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    return np.log(p[np.arange(N), LABELS]), entropy


@pytest.mark.parametrize("chunk", [8, N])
def test_log_probabilities_of_the_distribution_drawn_from(chunk):
    """Other ids have probability 0, and the logits no gradient there; the temperature divides both."""
    kept = packed(jnp.asarray(KEPT))

    def of(h, w):
        found = token_logprobs(h, w, LABELS, chunk, TEMPERATURE, kept)
        return clipped(jnp, found.logp), found

    (_, found), (dh, dw) = jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(H, W)
    want = drawn_from(H, W)
    for got, exact in zip(found, want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)
    # Neither the model's own, nor those of one of the two.
    for temperature, sets in ((1.0, None), (1.0, kept), (TEMPERATURE, None)):
        other = token_logprobs(H, W, LABELS, chunk, temperature, sets)
        assert all(np.abs(x - y).max() > 0.1 for x, y in zip(other, want, strict=True))
    rng, step = np.random.default_rng(1), 1e-6
    for _ in range(3):
        h, w = rng.standard_normal(H.shape), rng.standard_normal(W.shape)
        ahead, back = (clipped(np, drawn_from(H + s * h, W + s * w)[0]) for s in (step, -step))
        slope = (np.vdot(dh, h) + np.vdot(dw, w)).item()
        assert abs(slope - (ahead - back) / (2 * step)) < 1e-4 * np.sqrt(np.sum(dh**2) + np.sum(dw**2))


def test_whole_logits_never_exist_for_log_probabilities():
    n, v = 640, 999
    h, w, labels = jnp.zeros((n, D)), jnp.zeros((D, v)), jnp.zeros(n, jnp.int32)
    step = jax.grad(lambda h, w: jnp.exp(token_logprobs(h, w, labels, 64).logp).sum(), (0, 1))
    text = jax.jit(step).lower(h, w).as_text()
    assert f"64x{v}xf32" in text
    assert f"{n}x{v}x" not in text and f"10x64x{v}x" not in text

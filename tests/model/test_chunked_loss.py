"""The loss in chunks against log-softmax over everything at once, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.loss import weighted_nll

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

"""Routed experts against a loop over pairs: adversarial routing, gradients, the forms for decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.experts import FEW_ROWS, decode_experts, experts_apart, routed_experts

E, D, F, K = 6, 10, 7, 2
RNG = np.random.default_rng(0)
P = {
    "w_gate_edf": RNG.standard_normal((E, D, F)).astype(np.float32),
    "w_up_edf": RNG.standard_normal((E, D, F)).astype(np.float32),
    "w_down_efd": RNG.standard_normal((E, F, D)).astype(np.float32),
}
N = 150
X = RNG.standard_normal((N, D)).astype(np.float32)
WEIGHTS = RNG.uniform(0.1, 1, (N, K)).astype(np.float32)
DIRECTION = RNG.standard_normal((N, D)).astype(np.float32)


def pairs(kind):
    """int32 [n, k]"""
    if kind == "random":
        return np.stack([RNG.permutation(E)[:K] for _ in range(N)])
    if kind == "one_expert_takes_all":
        return np.tile([4, 1], (N, 1))
    if kind == "first_and_last_only":  # four empty experts between
        return np.tile([0, E - 1], (N, 1))
    if kind == "all_to_one_twice":
        return np.full((N, K), 3)
    if kind == "absent":  # ids outside [0, e), on both sides, whole tokens among them
        ids = RNG.integers(-2, E + 3, (N, K))
        ids[:20] = E
        return ids
    assert kind == "nobody"
    return np.full((N, K), -1)


KINDS = ("random", "one_expert_takes_all", "first_and_last_only", "all_to_one_twice", "absent", "nobody")


def loop(p, x, ids, weights):
    """Float64, one pair at a time; also the gradients of (output * DIRECTION).sum() by hand."""
    p = {k: np.asarray(v, np.float64) for k, v in p.items()}
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    y, dx, dw = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    dp = {k: np.zeros_like(v) for k, v in p.items()}
    for n in range(len(x)):
        for j, e in enumerate(ids[n]):
            if not 0 <= e < E:
                continue
            g, u = x[n] @ p["w_gate_edf"][e], x[n] @ p["w_up_edf"][e]
            sig = 1 / (1 + np.exp(-g))
            act, dy = g * sig * u, np.float64(DIRECTION[n])
            y[n] += weights[n, j] * (act @ p["w_down_efd"][e])
            dact = p["w_down_efd"][e] @ dy
            dw[n, j] = act @ dact
            dp["w_down_efd"][e] += weights[n, j] * np.outer(act, dy)
            dg = weights[n, j] * dact * u * sig * (1 + g * (1 - sig))
            du = weights[n, j] * dact * g * sig
            dp["w_gate_edf"][e] += np.outer(x[n], dg)
            dp["w_up_edf"][e] += np.outer(x[n], du)
            dx[n] += p["w_gate_edf"][e] @ dg + p["w_up_edf"][e] @ du
    return y, (dp, dx, dw)


@pytest.fixture(scope="module")
def value_and_grad():
    def run(p, x, ids, weights):
        y = routed_experts(p, x, ids, weights)
        return (y * DIRECTION).sum(), y

    return jax.jit(jax.grad(run, (0, 1, 3), has_aux=True))


@pytest.mark.parametrize("kind", KINDS)
def test_against_a_loop(value_and_grad, kind):
    ids = pairs(kind).astype(np.int32)
    grads, y = value_and_grad(P, X, ids, WEIGHTS)
    want, want_grads = loop(P, X, ids, WEIGHTS)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-4)

    def close(got, want):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * max(1.0, np.abs(want).max()))

    jax.tree.map(close, grads, want_grads)


@pytest.mark.parametrize("n", [1, 5, 40, FEW_ROWS + 1])
@pytest.mark.parametrize("apart", [True, False])
def test_decoding_forms(n, apart):
    """Chosen experts over all tokens, each over its own rows, and the training form; ids of absent experts are nobody's."""
    ids = pairs("absent")[-n:].astype(np.int32)
    p = {**P, "apart": experts_apart(P)} if apart else P
    got = jax.jit(decode_experts)(p, X[:n], ids, WEIGHTS[:n])
    np.testing.assert_allclose(got, loop(P, X[:n], ids, WEIGHTS[:n])[0], rtol=1e-5, atol=1e-4)


def test_bfloat16_is_computed_in_bfloat16():
    ids = pairs("random").astype(np.int32)
    got = jax.jit(routed_experts)(P, jnp.asarray(X, jnp.bfloat16), ids, WEIGHTS)
    assert got.dtype == jnp.bfloat16
    want = loop(P, X, ids, WEIGHTS)[0]
    error = np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want)
    assert 1e-4 < error < 2**-8 * np.sqrt(8)  # eight roundings: x, three weights, g, u, act, y

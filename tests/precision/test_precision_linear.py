"""Quantised linear layer, FFN and attention projection against NumPy, for every preset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.attention import core_inputs, core_output
from deepseek_jax.model.ffn import mlp
from deepseek_jax.model.layers import linear
from deepseek_jax.precision import PRESETS, preset
from deepseek_jax.precision.e5m6 import decode, encode
from deepseek_jax.precision.operands import ROW, SQUARE, TILE
from deepseek_jax.precision.policy import Policy
from deepseek_jax.precision.product import Quantised, quantise_weight
from tests.precision import oracle

NAMES = [name for name in PRESETS if name != "bf16"]
RNG = np.random.default_rng(5)
M, K, F, N = 150, 200, 136, 72  # nothing is a multiple of 128: edges are padded


def normal(*shape):
    """Gaussian rows of very different size, as tokens are."""
    size = np.exp(RNG.normal(0, 1, (shape[0], 1)))
    return (RNG.standard_normal(shape) * size).astype(np.float32)


X, DY, W = normal(M, K), normal(M, N), normal(K, N)
GATE, UP, DOWN = (normal(*shape) / 10 for shape in ((K, F), (K, F), (F, K)))
DY_FFN = normal(M, K)


def weight(w, policy):
    w = jnp.asarray(w)
    matrix = w.reshape(-1, w.shape[-1])
    return Quantised(w, *quantise_weight(matrix, policy), policy)


def gradients(fn, dy, *args):
    """(y, cotangents of the arguments); of a `Quantised`, its master's."""
    y, vjp = jax.vjp(fn, *args)
    return y, *(d.master if isinstance(d, Quantised) else d for d in vjp(dy))


@pytest.mark.parametrize("name", NAMES)
def test_linear(name):
    policy = PRESETS[name]
    got = jax.jit(lambda x, w, dy: gradients(linear, dy, x, w))(X, weight(W, policy), DY)
    for value, (want, magnitude) in zip(got, oracle.linear(policy, X, W, DY), strict=True):
        # float32 sums of at most 200 products and the multiplications by scales
        assert np.all(np.abs(value - want) <= 200 * 2.0**-24 * magnitude)


@pytest.mark.parametrize("name", NAMES)
def test_ffn(name):
    policy = PRESETS[name]
    p = {key: weight(w, policy) for key, w in (("w_gate_df", GATE), ("w_up_df", UP), ("w_down_fd", DOWN))}

    @jax.jit
    def run(x, p, dy):
        y, vjp = jax.vjp(lambda x, p: mlp(p, x), x, p)
        dx, dp = vjp(dy)
        return y, dx, *(dp[key].master for key in ("w_gate_df", "w_up_df", "w_down_fd"))

    for value, want in zip(run(X, p, DY_FFN), oracle.mlp(policy, X, GATE, UP, DOWN, DY_FFN), strict=True):
        # float32 noise of about 2^-21 moves a value over a rounding boundary of E4M3 (cells of 2^-4) once in 2^17
        # times, by 2^-3 of itself: 2^-3 * 2^-8.5.
        assert np.linalg.norm(value - want) / np.linalg.norm(want) < 3.5e-4


@pytest.mark.parametrize("name", ["deepseek_fp8", "per_token_channel"])
def test_attention_with_its_projection(name):
    """Against the core and the projection apart: only the kept attention output differs, by its format's rounding."""
    policy = PRESETS[name]
    b, t, h, v = 2, 40, 3, 16
    q, k, vs = (RNG.standard_normal((b, t, h, n)).astype(np.float32) for n in (24, 24, v))
    w, dy = (
        RNG.standard_normal((h, v, 56)).astype(np.float32),
        RNG.standard_normal((b, t, 56)).astype(np.float32),
    )
    wo = Quantised(jnp.asarray(w), *quantise_weight(w.reshape(h * v, -1), policy), policy)

    def together(q, k, v, w):
        return core_output(core_inputs(q, k, v, 0.2), None, w)

    def core(q, k, v):
        return together(q, k, v, jnp.eye(h * v.shape[-1]).reshape(h, v.shape[-1], -1))

    def apart(q, k, v, w):
        return linear(core(q, k, v).reshape(b, t, h, -1), w, n_in=2)

    got, want = (jax.jit(lambda *a, f=f: gradients(f, dy, *a))(q, k, vs, wo) for f in (together, apart))
    np.testing.assert_array_equal(got[0], want[0])
    kept_within = 2.0**-7 if policy.saved_attention == "e5m6" else 2.0**-4  # half a step of the mantissa
    for value, reference in zip(got[1:4], want[1:4], strict=True):
        # only the sum of do * o, taken off every score's gradient, knows the rounding
        assert np.linalg.norm(value - reference) / np.linalg.norm(reference) < kept_within
    assert not np.array_equal(got[1], want[1])
    o = np.asarray(core(q, k, vs)).reshape(b * t, h * v)
    kept = (
        decode(encode(o), h * v) if policy.saved_attention == "e5m6" else oracle.rounded(o, policy.fprop[0])
    )
    dw, magnitude = oracle.product(np.asarray(kept).T, dy.reshape(b * t, -1).T, policy.wgrad)
    # a value or two of o may lie on the other side of a rounding boundary: 2^-3 of one product
    assert np.all(
        np.abs(got[4].reshape(dw.shape) - dw) <= 80 * 2.0**-24 * magnitude + 2.0**-3 * magnitude / 8
    )


def test_kept_for_the_backward_pass():
    """Bytes: FP8 activations and scales, E5M6 attention output, no copy of a master weight."""
    policy = PRESETS["deepseek_fp8"]
    x = jnp.zeros((256, 256), jnp.bfloat16)
    w = weight(np.ones((256, 384), np.float32), policy)
    _, vjp = jax.vjp(linear, x, w)
    weights = w.dgrad_operand.q.size + 4 * w.dgrad_operand.scale.size
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) == 256 * 256 + 4 * 256 * 2 + weights
    q, v = jnp.zeros((2, 64, 4, 32), jnp.bfloat16), jnp.zeros((2, 64, 4, 32), jnp.bfloat16)
    wo = Quantised(jnp.zeros((4, 32, 16)), *quantise_weight(jnp.zeros((128, 16)), policy), policy)
    _, vjp = jax.vjp(lambda q, k, v: core_output(core_inputs(q, k, v, 1.0), None, wo), q, q, v)
    leaves = jax.tree.leaves(vjp)
    assert [leaf.nbytes for leaf in leaves if leaf.dtype == jnp.uint8] == [2 * 64 * 4 * 32 * 3 // 2]
    assert sum(leaf.size == v.size and leaf.dtype == jnp.bfloat16 for leaf in leaves) == 3  # q, k, v; not o


def test_fine_grained_keeps_small_tokens_that_one_scale_loses():
    """A token 10^6 times smaller than the largest survives 1x128 tiles, and vanishes under a scale for the tensor."""
    x = np.ones((2, 128), np.float32)
    x[1] *= 1e-6
    y = {
        n: np.asarray(linear(jnp.asarray(x), weight(np.eye(128, dtype=np.float32), PRESETS[n])))
        for n in NAMES
    }
    np.testing.assert_allclose(y["deepseek_fp8"][1], 1e-6, rtol=0.07)
    assert not y["per_tensor"][1].any()


def test_gradient_follows_the_function_where_it_is_smooth():
    """Along x itself the quantised function is linear: scales grow with x and the E4M3 values stay."""
    policy = PRESETS["deepseek_fp8"]
    w = weight(W, policy)
    y = linear(jnp.asarray(X), w)
    bigger = linear(jnp.asarray(X) * 1.5, w)
    # 1.5 x rounds, x / s with it: a few values change their E4M3 neighbour, each by 2^-3 of itself
    assert np.linalg.norm(bigger - 1.5 * y) / np.linalg.norm(1.5 * y) < 1e-3
    slope = float(((bigger - y) * DY).sum()) / 0.5
    _, dx, _ = gradients(linear, jnp.asarray(DY), jnp.asarray(X), w)
    # dgrad rounds dy anew (2^-4 at most, of random sign over 150 x 72 terms)
    scale = np.linalg.norm(np.asarray(y) * DY)
    assert abs(slope - float((dx * X).sum())) < 4 * 2.0**-4 * scale


def test_nothing_hides_a_nan():
    x = jnp.asarray(X).at[3, 7].set(jnp.nan).at[4, 8].set(jnp.inf)
    for name in ("deepseek_fp8", "per_token_channel"):
        y = np.asarray(linear(x, weight(W, PRESETS[name])))
        assert np.isnan(y[[3, 4]]).all() and np.isfinite(np.delete(y, [3, 4], axis=0)).all()


def test_presets():
    assert preset("bf16") is None
    with pytest.raises(ValueError, match=r"precision='fp8' is not one of .'bf16', 'deepseek_fp8'"):
        preset("fp8")
    with pytest.raises(ValueError, match="'odd': fprop mixes scales along the contraction"):
        Policy("odd", (TILE, ROW), (TILE, SQUARE), (TILE, TILE), TILE)

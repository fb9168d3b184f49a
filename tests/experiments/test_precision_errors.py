"""The measurements of the FP8 study: accumulation at 14 bits, errors of the presets, captured tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.layers import linear
from deepseek_jax.precision import PRESETS
from experiments.study.accumulation import tensor_core_product
from experiments.study.errors import accumulation_errors, capture, gemm_errors, synthetic


def test_tensor_core_keeps_13_fraction_bits():
    a, b = np.zeros((1, 64)), np.ones((1, 64))
    a[0, 0], a[0, 1] = 1.0, 2.0**-14  # cut off beside 1 ...
    assert tensor_core_product(a, b)[0, 0] == 1.0
    a[0, 1] = 2.0**-13  # ... and one bit higher not
    assert tensor_core_product(a, b)[0, 0] == 1 + 2.0**-13
    a[0, 1], a[0, 32] = 0.0, 2.0**-14  # of the next instruction: lost in the register, kept by promotion
    assert tensor_core_product(a, b, None)[0, 0] == 1.0
    assert tensor_core_product(a, b, 32)[0, 0] == np.float32(1 + 2.0**-14)
    a[0, :] = 0
    a[0, 3], a[0, 4] = -1.0, -(2.0**-14)  # towards zero on both sides
    assert tensor_core_product(a, b)[0, 0] == -1.0
    with pytest.raises(ValueError, match="K=40 and promote_every=128 must be multiples of 32"):
        tensor_core_product(np.ones((1, 40)), np.ones((1, 40)))


def test_promotion_stops_the_error_from_growing():
    errors = accumulation_errors((512, 4096), np.random.default_rng(0), size=8)
    short, long = errors["positive, 14 bits"]
    assert long > 3 * short
    short, long = errors["positive, promoted"]
    assert long < 1.2 * short and long < errors["positive, 14 bits"][1] / 10


def test_errors_of_gaussian_data_are_in_the_known_band():
    rng = np.random.default_rng(1)
    x, w, dy = (synthetic("gaussian", rng, *shape) for shape in ((128, 512), (512, 128), (128, 128)))
    fp8 = gemm_errors(PRESETS["deepseek_fp8"], x, w, dy)
    assert 6.5e-4 < fp8["fprop"].calc_diff < 7.5e-4 and 6.5e-4 < fp8["dgrad"].calc_diff < 7.5e-4
    assert 6.5e-4 < fp8["wgrad"].calc_diff < 1.2e-3  # the activation is quantised twice
    plain = gemm_errors(None, x, w, dy)
    assert all(2.0**-9 / 2 < e.relative_l2 < 2.0**-8 for e in plain.values())


def test_one_scale_underflows_where_tiles_do_not():
    rng = np.random.default_rng(1)
    x = synthetic("outlier channels", rng, 128, 512) * np.exp(rng.normal(0, 3, (128, 1))).astype(np.float32)
    w, dy = synthetic("gaussian", rng, 512, 128), synthetic("gaussian", rng, 128, 128)
    underflow = {
        n: gemm_errors(PRESETS[n], x, w, dy)["fprop"].underflow for n in ("per_tensor", "deepseek_fp8")
    }
    assert underflow["per_tensor"] > 0.1 > 100 * underflow["deepseek_fp8"]
    with pytest.raises(ValueError, match=r"kind='cauchy' is not one of .'gaussian'"):
        synthetic("cauchy", rng, 2, 2)


def test_capture_sees_input_and_output_gradient():
    rng = np.random.default_rng(3)
    params = {"a": {"w": jnp.asarray(rng.standard_normal((2, 6, 5)), jnp.float32)}, "b": jnp.ones((1, 1, 5))}
    x = jnp.asarray(rng.standard_normal((2, 3, 6)), jnp.float32)

    def layer(p, i):
        return (linear(x, jax.tree.map(lambda w: w[i], p["a"]["w"])) ** 2 * p["b"]).sum()

    def loss(p):
        return layer(p, 0) + layer(p, 1)

    seen_x, w, dy = capture(loss, params, {"a": (("a", "w"), 1)}, tokens=6)["a"]
    np.testing.assert_array_equal(seen_x, x.reshape(6, 6))
    np.testing.assert_array_equal(w, params["a"]["w"][1])
    np.testing.assert_allclose(dy, 2 * x.reshape(6, 6) @ w, rtol=1e-5)

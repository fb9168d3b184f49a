"""Quantisation, bit for bit against the NumPy oracle of `float8_oracle.py`."""

import functools
from typing import ClassVar

import float8_oracle as oracle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from op_suite import Case, OpSuite, pytest_generate, run

from pallas_kernels.blocks import COLUMN_TILE, ROW_TILE, SQUARE_BLOCK
from pallas_kernels.quantize import ops

pytest_generate_tests = pytest_generate
BLOCKS = {"1x128": ROW_TILE, "128x1": COLUMN_TILE, "128x128": SQUARE_BLOCK}


def hard_values() -> np.ndarray:
    """[256, 256] float32, every 128 x 128 block of another kind: Gaussian with outliers, all zero, magnitudes from far
    below the smallest subnormal to the top, and powers of two mixed with exact rounding ties."""
    rng = np.random.default_rng(0)
    x = np.zeros((256, 256), np.float32)
    x[:128, :128] = rng.standard_normal((128, 128)) * np.where(rng.random((128, 128)) < 0.01, 1e3, 1)
    spread = 2.0 ** rng.uniform(-24, 8, (128, 128)) * rng.choice([-1, 1], (128, 128))
    x[128:, :128] = spread
    exact = np.concatenate([oracle.MIDPOINTS[:-1], 2.0 ** np.arange(-12, 9), [448.0, 0.0]])
    x[128:, 128:] = rng.choice(np.concatenate([exact, -exact]), (128, 128)) * 2.0**3
    diagonal = np.arange(128, 256)
    x[diagonal, diagonal] = (
        448 * 2.0**3
    )  # a power-of-two scale for every row, column and the block: ties stay ties
    return x


def assert_bits(actual, expected) -> None:
    q, s = actual
    np.testing.assert_array_equal(np.asarray(s).view(np.uint32), expected[1].view(np.uint32))
    np.testing.assert_array_equal(np.asarray(q).view(np.uint8), expected[0])


def quantize_case(block, scale, dtype=jnp.float32, shape=None) -> Case:
    x = hard_values() if shape is None else hard_values()[: shape[0], : shape[1]]
    x = jnp.asarray(x, dtype)
    expected = oracle.quantize(np.asarray(x.astype(jnp.float32)), block, scale)
    return Case(
        lambda x, implementation: ops.quantize(x, block, scale, implementation),
        (x,),
        lambda out: assert_bits(out, expected),
    )


def stacked_case(block) -> Case:
    """Ragged blocks end with their matrix."""
    x = hard_values().reshape(2, 128, 256)[:, :100, :200]
    parts = [oracle.quantize(part, block, "fp32") for part in x]
    return Case(
        lambda x, implementation: ops.quantize(x, block, "fp32", implementation),
        (jnp.asarray(x),),
        lambda out: assert_bits(out, tuple(np.stack(part) for part in zip(*parts, strict=True))),
    )


def transposed_case(scale, rows=256, cols=256) -> Case:
    x = jnp.asarray(hard_values()[:rows, :cols], jnp.bfloat16)
    expected = oracle.quantize(np.asarray(x.astype(jnp.float32)).T, ROW_TILE, scale)
    return Case(
        lambda x, implementation: ops.quantize_transposed(x, scale, implementation),
        (x,),
        lambda out: assert_bits(out, expected),
    )


def requantize_case(scale, rows=256, cols=256) -> Case:
    q, s = ops.quantize(jnp.asarray(hard_values()[:rows, :cols]))
    x = oracle.dequantize(q, s, ROW_TILE).astype(np.float32)  # one rounding, as the op's float32 product has
    expected = oracle.quantize(x.T, ROW_TILE, scale)
    return Case(
        lambda q, s, implementation: ops.requantize_transposed(q, s, scale, implementation),
        (q, s),
        lambda out: assert_bits(out, expected),
    )


class TestQuantize(OpSuite):
    cases: ClassVar = {
        **{
            f"{name}_{scale}": functools.partial(quantize_case, block, scale)
            for name, block in BLOCKS.items()
            for scale in ("fp32", "ue8m0")
        },
        "1x128_bf16": functools.partial(quantize_case, ROW_TILE, "fp32", jnp.bfloat16),
        **{
            f"{name}_ragged": functools.partial(quantize_case, block, "fp32", jnp.float32, (130, 200))
            for name, block in BLOCKS.items()
        },
        "transposed": functools.partial(transposed_case, "fp32"),
        "requantize_fp32": functools.partial(requantize_case, "fp32"),
        "requantize_ue8m0": functools.partial(requantize_case, "ue8m0"),
        "transposed_ragged": functools.partial(transposed_case, "fp32", 200, 150),
        "requantize_ragged": functools.partial(requantize_case, "fp32", 200, 150),
        "128x128_leading_dims": functools.partial(stacked_case, SQUARE_BLOCK),
        "128x1_leading_dims": functools.partial(stacked_case, COLUMN_TILE),
    }


def swiglu_inputs(rows, f):
    keys = jax.random.split(jax.random.key(0), 2)
    gate_up = (3 * jax.random.normal(keys[0], (rows, 2 * f))).astype(jnp.bfloat16)
    weight = jax.random.uniform(keys[1], (rows,))
    gate, up = np.split(np.asarray(gate_up.astype(jnp.float32), np.float64), 2, axis=-1)
    return gate_up, weight, gate / (1 + np.exp(-gate)) * up


def assert_quantizes(y: np.ndarray, out) -> None:
    """The dequantised output lies within half a float8 step of y; the scales within float32 rounding of amax/448."""
    q, s = out
    whole = np.pad(np.abs(y), ((0, 0), (0, -y.shape[1] % 128)))
    amax = np.maximum(whole.reshape(len(y), -1, 128).max(-1), 1e-4)
    np.testing.assert_allclose(np.asarray(s), amax / 448, rtol=1e-5)
    step = np.repeat(np.asarray(s, np.float64), 128, -1)[:, : y.shape[1]]
    half = np.maximum(np.abs(y) * 2.0**-4, step * 2.0**-10)
    assert np.all(np.abs(oracle.dequantize(q, s, ROW_TILE) - y) <= half * (1 + 1e-4))


def swiglu_case(split: bool, weighted: bool, rows=128, f=256) -> Case:
    gate_up, weight, y = swiglu_inputs(rows, f)
    up = gate_up[:, f:] if split else None
    first = gate_up[:, :f] if split else gate_up
    expected = y * np.asarray(weight, np.float64)[:, None] if weighted else y
    return Case(
        lambda first, up, weight, implementation: ops.swiglu_quantize(
            first, up, weight, implementation=implementation
        ),
        (first, up, weight if weighted else None),
        lambda out: assert_quantizes(expected, out),
    )


class TestSwigluQuantize(OpSuite):
    cases: ClassVar = {
        "fused_weighted": functools.partial(swiglu_case, False, True),
        "split": functools.partial(swiglu_case, True, False),
        "ragged": functools.partial(swiglu_case, False, True, 100, 200),
        "ragged_split": functools.partial(swiglu_case, True, True, 100, 200),
    }


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("implementation", ["reference", "xla", "mosaic"])
def test_nonfinite_values_show_in_their_tile_only(bad, implementation):
    x = np.array(jax.random.normal(jax.random.key(1), (64, 256)))
    x[5, 200] = bad
    q, s = run(
        lambda x, implementation: ops.quantize(x, implementation=implementation),
        implementation,
        jnp.asarray(x),
    )
    back = oracle.dequantize(q, s, ROW_TILE)
    assert np.isnan(back[5, 200])
    poisoned = np.isnan(back)
    if np.isinf(bad):
        assert poisoned[5, 128:].all()
    assert not poisoned[5, :128].any() and not np.delete(poisoned, 5, axis=0).any()
    np.testing.assert_array_equal(np.isnan(ops.dequantize(q, s)), poisoned)


def test_zero_tile_has_the_floor_scale():
    zeros = jnp.zeros((1, 128))
    assert float(ops.quantize(zeros)[1][0, 0]) == np.float32(2.2321428616578487e-07)
    assert float(ops.quantize(zeros, scale="ue8m0")[1][0, 0]) == 2.0**-22


def test_power_of_two_scales_are_exact_at_powers_of_two():
    exponents = np.arange(-20, 100)
    amax = np.zeros((exponents.size, 128), np.float32)
    amax[:, 7] = 448 * 2.0**exponents
    s = ops.quantize(jnp.asarray(amax), scale="ue8m0")[1][:, 0]
    np.testing.assert_array_equal(np.asarray(s), 2.0**exponents)
    s = ops.quantize(jnp.asarray(amax * np.float32(1 + 2**-20)), scale="ue8m0")[1][:, 0]
    np.testing.assert_array_equal(np.asarray(s), 2.0 ** (exponents + 1))


def test_compiler_rounds_once_to_nearest_even():
    """XLA's own float32 -> float8 conversion: no second rounding through a 16-bit type near the midpoints."""
    near = [np.nextafter(oracle.MIDPOINTS.astype(np.float32), np.float32(end)) for end in (0, 1e9)]
    y = np.concatenate(
        [oracle.MIDPOINTS.astype(np.float32), *near, np.linspace(-448, 448, 20001, dtype=np.float32)]
    )
    y = np.concatenate([y, -y])
    converted = jax.jit(lambda y: y.astype(jnp.float8_e4m3fn))(y)
    np.testing.assert_array_equal(np.asarray(converted).view(np.uint8), oracle.encode(y))


def test_oracle_agrees_with_itself_and_with_ml_dtypes():
    finite = np.flatnonzero(np.arange(256) & 0x7F != 0x7F).astype(np.uint8)
    np.testing.assert_array_equal(oracle.encode(oracle.VALUES[finite].astype(np.float32)), finite)
    y = (np.random.default_rng(2).standard_normal(50_000) * 100).astype(np.float32)
    np.testing.assert_array_equal(oracle.encode(y), y.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    nearest = np.abs(y[:500, None] - oracle.VALUES[finite]).min(-1)
    np.testing.assert_array_equal(np.abs(oracle.VALUES[oracle.encode(y[:500])] - y[:500]), nearest)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_leading_dims_are_batch(block):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, 130, 200)), jnp.float32)
    q, s = jax.jit(functools.partial(ops.quantize, block=block))(x)
    assert_bits((q[1, 2], s[1, 2]), oracle.quantize(np.asarray(x[1, 2]), block, "fp32"))
    back = jax.jit(functools.partial(ops.dequantize, block=block))(q, s)
    np.testing.assert_array_equal(back, oracle.dequantize(q, s, block).astype(np.float32))


def test_bad_arguments_are_named():
    x = jnp.ones((4, 128))
    q, s = ops.quantize(x)
    for call, message in (
        (lambda: ops.quantize(x, block=(64, 64)), r"block=\(64, 64\) is not supported"),
        (lambda: ops.quantize(x, scale="e5m2"), "scale='e5m2' is unknown"),
        (lambda: ops.quantize(x.astype(jnp.int32)), "x is int32"),
        (lambda: ops.quantize(x[0]), "at least two dims"),
        (lambda: ops.dequantize(q, s[:, :0]), r"scale has shape \(4, 0\)"),
        (lambda: ops.dequantize(x, s), "q is float32"),
        (lambda: ops.swiglu_quantize(x[:, :127]), "127 columns"),
        (lambda: ops.swiglu_quantize(x, x[:2]), "they must be equal"),
        (lambda: ops.swiglu_quantize(x, x, x), "routing_weight has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

"""E5M6 against the definition of the format, in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision.e5m6 import decode, encode


def values() -> np.ndarray:
    """Every positive normal E5M6 number, ascending, with zero."""
    exponent, mantissa = np.meshgrid(np.arange(1, 31), np.arange(64), indexing="ij")
    return np.concatenate([[0.0], np.ravel((1 + mantissa / 64) * 2.0 ** (exponent - 15))])


def test_every_number_survives():
    """The largest is kept below half the range, so the upper octave comes back through the scale."""
    x = np.concatenate([values(), -values()])
    for tile in np.array_split(x, len(x) // 64):
        x32 = tile.astype(np.float32)[None]
        np.testing.assert_array_equal(decode(encode(x32), x32.shape[1]), x32)


def test_rounding_to_nearest_even():
    numbers = values()[1:]
    middle = (numbers[1:] + numbers[:-1]) / 2
    lower_is_even = np.arange(len(middle)) % 2 == 0  # mantissa bits count up; 64 is even
    want = np.where(lower_is_even, numbers[:-1], numbers[1:])
    keep = middle < 2.0**14  # a tile led by 2^14 has scale 1
    x = np.append(middle[keep], 2.0**14).astype(np.float32)
    for start in range(0, len(x) - 1, 127):
        tile = np.append(x[start : start + 127], np.float32(2**14))[None]
        got = np.asarray(decode(encode(tile), tile.shape[1]))[0, :-1]
        np.testing.assert_array_equal(got, np.append(want[keep], 2.0**14)[start : start + 127][: len(got)])


@pytest.mark.parametrize("columns", [1, 7, 128, 200])
def test_shapes_and_size(columns):
    x = np.random.default_rng(0).standard_normal((3, 5, columns)).astype(np.float32)
    kept = encode(x)
    assert kept.bytes.dtype == jnp.uint8 and kept.bytes.shape == (3, 5, 3 * -(-columns // 2))
    assert kept.scale.shape == (3, 5, -(-columns // 128))
    assert np.all(np.exp2(np.round(np.log2(kept.scale))) == kept.scale)  # powers of two
    got = np.asarray(decode(kept, columns))
    assert np.all(np.abs(got - x) <= 2.0**-7 * np.abs(x))  # half a step of 6 mantissa bits
    assert decode(kept, columns, jnp.bfloat16).dtype == jnp.bfloat16


def test_zeros_tiny_huge_and_nonfinite():
    zeros = np.zeros((1, 128), np.float32)
    assert not np.asarray(decode(encode(zeros), 128)).any()
    for size in (1e-20, 1e30):
        x = np.full((1, 128), size, np.float32)
        np.testing.assert_allclose(decode(encode(x), 128), x, rtol=2.0**-7)
    for bad in (np.nan, np.inf):
        x = np.ones((2, 128), np.float32)
        x[0, 5] = bad
        got = np.asarray(decode(encode(x), 128))
        assert np.isnan(got[0, 5]) and (got[1] == 1).all()

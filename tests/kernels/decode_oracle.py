"""Decoding over pages in NumPy float64, its data, and bounds of its error.

Pages that no sequence uses, and what used pages hold beyond a length, are NaN; entries of a block table beyond a length are
no page at all. Dims: b sequence, t query token, h head, s key, d = latent + rope.
"""

import dataclasses
import functools

import float8_oracle
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mla_decode.ops import quantize_cache

NO_PAGE = 2147480000
SCALE = 192**-0.5 * 1.2  # not that of the width


@functools.partial(jax.jit, static_argnames=("latent",))
def quantized(x, latent):
    """An FP8 cache; the bytes of NaN are 0xFF, which is NaN in each of its formats."""
    return jnp.where(jnp.isnan(x[..., :1]), jnp.uint8(0xFF), quantize_cache(x, latent))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Operands of `mla_decode`, and what the oracle needs: keys_bsd float64, the values that the cache stores."""

    q: jnp.ndarray
    cache: jnp.ndarray
    block_table: jnp.ndarray
    lengths: jnp.ndarray
    keys_bsd: list[np.ndarray]
    latent: int

    @property
    def operands(self) -> tuple:
        return self.q, self.cache, self.block_table, self.lengths


def stored(cache: np.ndarray, latent: int) -> np.ndarray:
    """The values of a cache's tokens [n, width], by the layout's definition where they are bytes."""
    if cache.dtype != np.uint8:
        return cache.astype(np.float64)
    scales = -(-latent // 128)
    q = float8_oracle.decode(np.ascontiguousarray(cache[:, :latent]))
    scale = np.ascontiguousarray(cache[:, latent : latent + 4 * scales]).view("<f4").astype(np.float64)
    rope = np.ascontiguousarray(cache[:, latent + 4 * scales :]).view("<u2").astype(np.uint32) << 16
    return np.concatenate([q * np.repeat(scale, 128, 1)[:, :latent], rope.view(np.float32)], 1)


def make(
    seed: int, lengths, t: int, h: int, max_pages: int, *, latent=32, rope=16, page=64, kind="f32", std=1.0
) -> Problem:
    """`kind`: f32, bf16 or fp8 (queries in BF16)."""
    rng = np.random.default_rng(seed)
    dtype = jnp.float32 if kind == "f32" else jnp.bfloat16
    d = latent + rope
    used = [-(-n // page) for n in lengths]
    order = rng.permutation(
        len(lengths) * max_pages + 1
    )  # as many pages whatever the lengths: one program for all
    table = np.full((len(lengths), max_pages), NO_PAGE, np.int32)
    x = np.full((len(order), page, d), np.nan, np.float32)
    for b, (length, n) in enumerate(zip(lengths, used, strict=True)):
        table[b, :n], order = order[:n], order[n:]
        keys = np.full((n * page, d), np.nan, np.float32)
        keys[:length] = rng.standard_normal((length, d), np.float32) * std
        x[table[b, :n]] = keys.reshape(n, page, d)
    cache = jnp.asarray(x, dtype)
    if kind == "fp8":
        cache = quantized(cache, latent)
    on_host = np.asarray(cache)
    keys = [
        stored(on_host[table[b, :n]].reshape(n * page, cache.shape[-1])[:length], latent)
        for b, (length, n) in enumerate(zip(lengths, used, strict=True))
    ]
    q = jnp.asarray(rng.standard_normal((len(lengths), t, h, d), np.float32) * std, dtype)
    return Problem(q, cache, jnp.asarray(table), jnp.asarray(lengths, jnp.int32), keys, latent)


@dataclasses.dataclass(frozen=True)
class Expected:
    """out_bthc, lse_bht in float64 and bounds of the error of a float32 computation; magnitude_bthc: the sum of |value| by
    probability, what the rounding of probabilities is relative to."""

    out: np.ndarray
    lse: np.ndarray
    out_bound: np.ndarray
    lse_bound: np.ndarray
    magnitude: np.ndarray


def expected(problem: Problem, scale: float = SCALE) -> Expected:
    """Two roundings per term of a sum, each of half a unit in the last place of float32. A probability is off by the error
    of its score and of the log-sum-exp, the sums by one rounding per key and block."""
    b, t, h, d = problem.q.shape
    out, lse = np.zeros((b, t, h, problem.latent)), np.full((b, h, t), np.inf)
    out_bound, lse_bound, magnitude = out.copy(), np.zeros(lse.shape), out.copy()
    for i, keys in enumerate(problem.keys_bsd):
        q = np.asarray(problem.q[i]).astype(np.float64)
        for j in range(t):
            seen = keys[: max(0, len(keys) - t + j + 1)]
            if not len(seen):
                continue
            score, terms = q[j] @ seen.T * scale, np.abs(q[j]) @ np.abs(seen).T * scale
            top = score.max(1, keepdims=True)
            lse[i, :, j] = top[:, 0] + np.log(np.exp(score - top).sum(1))
            prob = np.exp(score - lse[i, :, j][:, None])
            values = seen[:, : problem.latent]
            out[i, j], magnitude[i, j] = prob @ values, prob @ np.abs(values)
            unit = 2.0**-23
            of_score = (d + 4) * unit * terms.max(1) + unit * np.abs(score).max(1)
            of_sums = (len(seen) + 16) * unit
            lse_bound[i, :, j] = of_score + of_sums + unit * np.abs(lse[i, :, j])
            out_bound[i, j] = (2 * of_score + 2 * of_sums)[:, None] * magnitude[i, j]
    return Expected(out, lse, out_bound, lse_bound, magnitude)


def assert_decoded(actual, problem: Problem, expected: Expected) -> None:
    """Compares results with the oracle's, within its bounds; with BF16 queries, probabilities and outputs are rounded to 8
    bits more, each by at most half a unit."""
    out, lse = (np.asarray(x) for x in actual)
    assert out.dtype == problem.q.dtype and lse.dtype == np.float32
    assert out.shape == expected.out.shape and lse.shape == expected.lse.shape
    bound = expected.out_bound
    if problem.q.dtype == jnp.bfloat16:
        bound = bound + 2.0**-8 * expected.magnitude + 2.0**-8 * np.abs(expected.out)
    error = np.abs(out.astype(np.float64) - expected.out)
    assert np.all(error <= bound), f"out is off by {np.nanmax(error - bound)} more than its bound"
    nothing = np.isposinf(expected.lse)
    assert np.array_equal(np.isposinf(lse), nothing)
    error = np.abs(lse[~nothing] - expected.lse[~nothing])
    assert np.all(error <= expected.lse_bound[~nothing]), f"lse is off by {error.max()}"


def passes_flash_mla(actual, expected: Expected) -> bool:
    """FlashMLA's own criterion for BF16: each element within an absolute or a relative tolerance, and the cosine."""

    def close(x, y, absolute, relative):
        x, y = np.asarray(x).astype(np.float64), np.asarray(y)
        error = np.abs(np.where(x == y, 0, x) - np.where(x == y, 0, y))  # of equal infinities none
        return np.all((error < absolute) | (error < relative * np.abs(y)))

    out, lse = actual
    flat, right = np.asarray(out).astype(np.float64).ravel(), expected.out.ravel()
    total = flat @ flat + right @ right
    cosine = 0.0 if total == 0 else 1 - 2 * (flat @ right) / total
    return bool(
        close(out, expected.out, 8e-4, 2.01 / 128)
        and cosine < 5e-6
        and close(lse, expected.lse, 1e-6, 8.01 / 65536)
    )

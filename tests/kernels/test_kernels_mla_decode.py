"""Decoding over pages against float64: reference and XLA path over the grid of FlashMLA's tests, the kernel on a few."""

import functools

import float8_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_oracle import SCALE, assert_decoded, expected, make, passes_flash_mla, stored
from op_suite import NO_INTERPRETER, run

from pallas_kernels.mla_decode import fallback, kernel
from pallas_kernels.mla_decode.kernel_plan import plan
from pallas_kernels.mla_decode.ops import dequantize_cache, mla_decode, quantize_cache, token_bytes
from tests.kernels.interpreter import HAS_INTERPRETER

# FlashMLA's grid, each head count with some B, queries per sequence and kind of cache; `decode_grid.py` runs all of it.
GRID = [
    (64, 2, 1, "f32"),
    (6, 4, 3, "bf16"),
    (2, 1, 9, "fp8"),
    (6, 2, 63, "bf16"),
    (1, 4, 64, "fp8"),
    (2, 2, 126, "f32"),
    (1, 1, 128, "bf16"),
    (1, 4, 128, "fp8"),
]


@functools.partial(jax.jit, static_argnames=("latent",))
def both(q, cache, block_table, lengths, latent):
    operands = (q, cache, block_table, lengths)
    return [
        mla_decode(*operands, scale=SCALE, latent=latent, implementation=implementation)
        for implementation in ("reference", "xla")
    ]


def varied(seed: int, b: int, longest: int) -> list[int]:
    """Lengths as in FlashMLA's tests, around a half of the longest; one of several sequences is empty."""
    drawn = (
        np.random.default_rng(seed).normal(longest / 2, longest / 4, b).clip(1, longest).astype(int).tolist()
    )
    return [*drawn[:-1], 0] if b > 1 else drawn


def check_grid(b, t, h, kind):
    for s_k in (20, 140, 4096):
        for lengths in ([s_k] * b, varied(s_k, b, s_k)):
            problem = make(s_k, lengths, t, h, 64, kind=kind, std=1.0)
            right = expected(problem)
            for got in both(*problem.operands, problem.latent):
                assert_decoded(got, problem, right)


@pytest.mark.parametrize(("b", "t", "h", "kind"), GRID)
def test_grid(b, t, h, kind):
    check_grid(b, t, h, kind)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_model_widths_pass_flash_mla(kind):
    """512 + 64 wide, data and criterion as in FlashMLA's tests."""
    problem = make(0, [140, 1, 0, 2, 65], 2, 16, 3, latent=512, rope=64, kind=kind, std=0.1)
    right = expected(problem)
    for got in both(*problem.operands, 512):
        assert passes_flash_mla(got, right)
        assert_decoded(got, problem, right)


@pytest.mark.parametrize(("lengths", "kind"), [([4000, 1, 0, 140, 900], "fp8"), ([300, 2], "f32")])
def test_in_blocks_as_where_there_is_no_cpu(lengths, kind, monkeypatch):
    """Other platforms' form of the fallback, with and without a loop."""
    monkeypatch.setattr(fallback.lax, "platform_dependent", lambda *xs, cpu, default: default(*xs))
    problem = make(3, lengths, 2, 4, 8 if kind == "f32" else 64, kind=kind)
    got = fallback.mla_decode(*problem.operands, scale=SCALE, latent=problem.latent)
    assert_decoded(got, problem, expected(problem))


def test_nothing_to_attend():
    """No key at all, fewer keys than new tokens: queries without a key give 0 and +inf."""
    problem = make(1, [0, 1, 3], 3, 2, 1)
    for out, lse in both(*problem.operands, problem.latent):
        nothing = np.array([[True] * 3, [True, True, False], [False] * 3])
        assert np.array_equal(np.isposinf(lse), np.broadcast_to(nothing[:, None], (3, 2, 3)))
        assert np.all(np.asarray(out)[nothing] == 0) and np.isfinite(out).all()


def test_scores_of_any_size():
    """The largest scores lie far apart and in any block: nothing overflows, nothing is lost."""
    problem = make(2, [1500, 513], 1, 2, 24, std=12.0)
    right = expected(problem)
    assert np.abs(right.lse).max() > 200
    for got in both(*problem.operands, problem.latent):
        assert_decoded(got, problem, right)


@pytest.mark.parametrize("page", [16, 128])
def test_other_pages(page):
    problem = make(3, [100, 300], 2, 4, 1024 // page, page=page)
    right = expected(problem)
    for got in both(*problem.operands, problem.latent):
        assert_decoded(got, problem, right)


@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (32, 16), (160, 8)])
def test_fp8_cache(latent, rope):
    """Bytes as the format says, written here one block after the other; scales are powers of two, with their floor."""
    rng = np.random.default_rng(latent)
    x = rng.standard_normal((6, latent + rope)).astype(np.float32) * 2.0 ** rng.integers(-14, 9, (6, 1))
    x[1] = 0
    x[2, 5] = np.nan
    x[3, 0] = 448 * 2.0**-3  # its block's scale is a power of two already, where the others allow it
    x = np.asarray(jnp.asarray(x, jnp.bfloat16)).astype(np.float32)
    cache = np.asarray(quantize_cache(jnp.asarray(x), latent))
    assert cache.shape == (6, token_bytes(latent, rope)) and cache.dtype == np.uint8
    assert token_bytes(512, 64) == 656
    for row, token in zip(cache, x, strict=True):
        scales = []
        for start in range(0, latent, 128):
            block = token[start : min(start + 128, latent)]
            scale = np.maximum(np.abs(block).max() / np.float32(448), np.float32(1e-4))
            scales.append(float8_oracle.power_of_two_above(scale) if scale > 0 else scale)
            right = float8_oracle.encode(block / scales[-1])
            np.testing.assert_array_equal(row[start : start + len(block)], right)
        width = 4 * len(scales)
        written = np.ascontiguousarray(row[latent : latent + width]).view("<f4")
        np.testing.assert_array_equal(written, np.array(scales, np.float32))
        rope_bits = np.ascontiguousarray(row[latent + width :]).view("<u2").astype(np.uint32) << 16
        np.testing.assert_array_equal(rope_bits.view(np.float32), token[latent:])
    for dtype in (jnp.float32, jnp.bfloat16):  # BF16 holds every latent times its scale
        read = np.asarray(dequantize_cache(jnp.asarray(cache), latent, dtype)).astype(np.float64)
        np.testing.assert_array_equal(read, stored(cache, latent))
    largest_scale = 2 * np.maximum(np.nanmax(np.abs(x), axis=1, keepdims=True) / 448, 1e-4)
    bound = (
        np.abs(x) * 2.0**-4 + largest_scale * 2.0**-10
    )  # half a unit of 3 bits, or of the subnormal numbers
    assert np.all((np.abs(read - x) <= bound) | np.isnan(x) | np.isnan(read))
    assert np.isnan(read).sum() == min(128, latent)  # all of the block with the NaN


@pytest.mark.skipif(not HAS_INTERPRETER, reason=NO_INTERPRETER)
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("lengths", "t", "h", "num_sms", "page"),
    [
        # a sequence over two parts, one with no key, rows that see fewer keys than there are
        ([600, 0, 70], 2, 20, 3, 64),
        # 90 rows in two blocks; a page that is two of the kernel's; half of the last step is beyond the end
        ([130], 3, 30, 2, 128),
    ],
)
def test_kernel(kind, lengths, t, h, num_sms, page):
    """In the interpreter, with race detection: against float64 as the others."""
    problem = make(4, lengths, t, h, 1024 // page, latent=128, rope=64, kind=kind, page=page)

    def call(*operands_and_implementation):
        *operands, _ = operands_and_implementation
        return kernel.mla_decode(*operands, scale=SCALE, latent=128, num_sms=num_sms)

    assert_decoded(run(call, "mosaic", *problem.operands), problem, expected(problem))


@pytest.mark.parametrize("parts", [1, 7, 66])
@pytest.mark.parametrize("lengths", [[0], [1, 70000], [4096] * 67, [0, 0, 900, 129, 128, 127]])
def test_plan_divides_all_steps(lengths, parts):
    """Each step of each sequence lies in one part; parts are equal; pieces of a sequence are where `combine` looks."""
    p = jax.tree.map(np.asarray, plan(jnp.asarray(lengths, jnp.int32), parts, 128))
    seen = {b: [] for b in range(len(lengths))}
    for part in range(parts):
        for b in range(p.first_p[part], p.last_p[part]):
            begin = part * p.length[0] - p.start_b[b]
            first, last = max(begin, 0), min(begin + p.length[0], p.end_b[b] - p.start_b[b])
            assert first < last
            seen[b].append((first, last, part))
    cut = {}
    for b, runs in seen.items():
        steps = max(-(-lengths[b] // 128), 1)
        assert [first for first, _, _ in runs] == [0, *(last for _, last, _ in runs[:-1])] and runs[-1][
            1
        ] == steps
        if len(runs) > 1:
            cut[b] = [part for _, _, part in runs]
    assert p.length[0] <= max(-(-(sum(max(-(-n // 128), 1) + 2 for n in lengths)) // parts), 4)
    for part in range(parts):
        if p.cut_p[part] < len(lengths):
            assert cut.pop(p.cut_p[part]) == [part - 1, *range(part, p.until_p[part])]
    assert not cut


def test_bad_operands_are_named():
    q, cache = jnp.zeros((2, 1, 4, 48)), jnp.zeros((5, 16, 48))
    table, lengths = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2,), jnp.int32)

    def call(q=q, cache=cache, table=table, lengths=lengths, latent=32, **options):
        return lambda: mla_decode(q, cache, table, lengths, scale=1.0, latent=latent, **options)

    for wrong, message in (
        (call(q=q[0]), r"q is float32\[1, 4, 48\]"),
        (call(q=q.astype(jnp.float16)), "q is float16"),
        (call(latent=49), "latent=49 with queries of 48"),
        (call(cache=cache[..., :40]), r"cache is float32\[5, 16, 40\]"),
        (call(cache=cache.astype(jnp.bfloat16)), "cache is bfloat16"),
        (call(cache=jnp.zeros((5, 16, 48), jnp.uint8)), r"uint8\[pages, page, 68\]"),
        (call(cache=cache[:0]), "is empty"),
        (call(table=table[:1]), r"block_table is int32\[1, 3\]"),
        (call(lengths=lengths.astype(jnp.float32)), r"lengths float32\[2\]"),
        (call(implementation="mosaic"), "does not support this call"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()

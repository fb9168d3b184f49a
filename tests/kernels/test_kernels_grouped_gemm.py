"""The grouped GEMMs, FP8 and BF16, against float64: padding, empty groups, decoding masks, gradients per group."""

import functools
from typing import ClassVar

import gemm_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemm_oracle import normal, quantized, small
from op_suite import Case, OpSuite, assert_product, build, pytest_generate, run

from pallas_kernels.blocks import SQUARE_BLOCK
from pallas_kernels.fp8_grouped_gemm.ops import fp8_grouped_gemm, fp8_grouped_gemm_masked, fp8_grouped_wgrad
from pallas_kernels.grouped_gemm.ops import grouped_gemm, grouped_wgrad
from pallas_kernels.groups import aligned_sizes, present_tiles, row_groups, tile_groups

pytest_generate_tests = pytest_generate
GROUPS, N, K = 3, 128, 384
SIZES = (100, 0, 200)  # group 1 is empty; both others end in padding; the last 128 rows belong to nobody


def ids(alignment=128, rows=512) -> jnp.ndarray:
    return row_groups(jnp.asarray(SIZES, jnp.int32), rows, alignment)


def contiguous_case(out_dtype=jnp.float32, alignment=128, rows=512, kernel=True, n=N, k=K, **tile) -> Case:
    a, a_scale, a64 = quantized(0, (rows, k))
    b, b_scale, b64 = quantized(1, (GROUPS, n, k), SQUARE_BLOCK)
    group_ids = ids(alignment, rows)
    expected, magnitude = oracle.contiguous(a64, b64, group_ids)

    def call(*operands_and_implementation):
        *operands, implementation = operands_and_implementation
        return fp8_grouped_gemm(*operands, out_dtype, alignment, implementation, small(**tile))

    only = ("reference", "xla", "mosaic") if kernel else ("reference", "xla")
    check = lambda out: assert_product(out, expected, magnitude, k + 4)  # noqa: E731
    return Case(call, (a, a_scale, b, b_scale, group_ids), check, only)


ROOM, PRESENT = 128, (0, 17, 128)  # of the masked product: rows of a group, and how many of them are there


def masked_case(n=N, **tile) -> Case:
    a, a_scale, a64 = quantized(0, (GROUPS, ROOM, K))
    b, b_scale, b64 = quantized(1, (GROUPS, n, K), SQUARE_BLOCK)
    there = np.arange(ROOM) < np.asarray(PRESENT)[:, None]
    rows = np.where(there, np.arange(GROUPS)[:, None], -1)
    expected, magnitude = oracle.contiguous(a64.reshape(-1, K), b64, rows.reshape(-1))

    def call(*operands_and_implementation):
        *operands, implementation = operands_and_implementation
        return fp8_grouped_gemm_masked(*operands, jnp.float32, implementation, small(tile_m=64, **tile))

    def check(out):
        there_m = there.reshape(-1)
        assert_product(out.reshape(-1, n)[there_m], expected[there_m], magnitude[there_m], K + 4)

    return Case(call, (a, a_scale, b, b_scale, jnp.asarray(PRESENT, jnp.int32)), check)


def wgrad_case(accumulate: bool, m=128, n=N, **tile) -> Case:
    tokens = 640
    a, a_scale, a64 = quantized(0, (m, tokens))
    b, b_scale, b64 = quantized(1, (n, tokens))
    sizes = aligned_sizes(jnp.asarray(SIZES, jnp.int32))
    c = normal(2, GROUPS, m, n) if accumulate else None
    expected, magnitude = oracle.wgrad(a64, b64, sizes, c)

    def call(*operands_and_implementation):
        *operands, implementation = operands_and_implementation
        return fp8_grouped_wgrad(*operands, implementation, small(stages=3, **tile))

    def check(out):
        assert_product(out, expected, magnitude, tokens + 4)
        empty = np.zeros((m, n)) if c is None else np.asarray(c[1])
        np.testing.assert_array_equal(np.asarray(out[1]), empty)

    return Case(call, (a, a_scale, b, b_scale, sizes, c), check)


class TestFp8GroupedGemm(OpSuite):
    cases: ClassVar = {
        "contiguous": contiguous_case,
        "contiguous_bf16": functools.partial(contiguous_case, jnp.bfloat16),
        "small_alignment": functools.partial(contiguous_case, alignment=8, rows=320, kernel=False),
        "masked": masked_case,
        "masked_wide_cluster": functools.partial(masked_case, n=512, tile_n=256, cluster=2),
        "wgrad": functools.partial(wgrad_case, False),
        "wgrad_accumulate": functools.partial(wgrad_case, True),
        "cluster": functools.partial(contiguous_case, n=256, k=256, cluster=2),
        "wgrad_cluster": functools.partial(wgrad_case, True, n=256, cluster=2),
        "ragged": functools.partial(contiguous_case, n=150, k=320, tile_n=64),
        "ragged_wgrad": functools.partial(wgrad_case, True, m=80, n=150),
    }


@pytest.mark.parametrize(("implementation", "left"), [("mosaic", np.nan), ("xla", 0)])
def test_tiles_of_absent_rows_are_not_written(implementation, left):
    """The interpreter's memory is NaN where nothing was written."""
    case = build(TestFp8GroupedGemm.cases["masked"])
    out = np.asarray(run(case.call, implementation, *case.operands))
    np.testing.assert_array_equal(out[0], left)
    np.testing.assert_array_equal(out[1, 64:], left)
    assert np.isfinite(out[2]).all()


@pytest.mark.parametrize("rows_g", [(0, 0, 0), (0, 17, 128), (64, 65, 1), (128, 500, 0)])
def test_tiles_of_present_rows(rows_g):
    found = present_tiles(jnp.asarray(rows_g, jnp.int32), ROOM, 64)
    each = [min(-(-rows // 64), ROOM // 64) for rows in rows_g]
    expected = [(g, g * (ROOM // 64) + i) for g, tiles in enumerate(each) for i in range(tiles)]
    assert found.present.tolist() == [len(expected)]
    tiles = zip(found.group.tolist(), found.tile.tolist(), strict=True)
    assert list(tiles)[: len(expected)] == expected


def bf16_case(
    transpose_b: bool, out_dtype=jnp.float32, alignment=128, rows=512, kernel=True, n=N, k=K, **tile
) -> Case:
    a = normal(0, rows, k).astype(jnp.bfloat16)
    weight = normal(1, GROUPS, n, k).astype(jnp.bfloat16)
    b = weight if transpose_b else weight.swapaxes(1, 2)
    group_ids = ids(alignment, rows)
    expected, magnitude = oracle.contiguous(
        np.asarray(a, np.float64), np.asarray(weight, np.float64), group_ids
    )

    def call(a, b, group_ids, implementation):
        return grouped_gemm(
            a, b, group_ids, transpose_b, out_dtype, alignment, implementation, small(stages=3, **tile)
        )

    only = ("reference", "xla", "mosaic") if kernel else ("reference", "xla")
    check = lambda out: assert_product(out, expected, magnitude, k + 4)  # noqa: E731
    return Case(call, (a, b, group_ids), check, only)


def bf16_wgrad_case(accumulate: bool, out_dtype=jnp.float32, m=128, n=N, **tile) -> Case:
    tokens = 640
    a, b = (normal(seed, tokens, width).astype(jnp.bfloat16) for seed, width in enumerate((m, n)))
    sizes = jnp.asarray(SIZES, jnp.int32)
    padded, c = aligned_sizes(sizes), None
    if accumulate:  # sizes without padding, rows of which are zero in one operand
        b, c = jnp.where(row_groups(sizes, tokens)[:, None] >= 0, b, 0), normal(2, GROUPS, m, n)
    else:
        sizes = padded
    expected, magnitude = oracle.wgrad(np.asarray(a, np.float64).T, np.asarray(b, np.float64).T, padded, c)

    def call(a, b, sizes, c, implementation):
        config = small(stages=3, **tile)
        return grouped_wgrad(a, b, sizes, c, out_dtype, implementation=implementation, config=config)

    return Case(call, (a, b, sizes, c), lambda out: assert_product(out, expected, magnitude, tokens + 4))


class TestGroupedGemm(OpSuite):
    cases: ClassVar = {
        "forward": functools.partial(bf16_case, True),
        "input_gradient_bf16": functools.partial(bf16_case, False, jnp.bfloat16),
        "small_alignment": functools.partial(bf16_case, True, alignment=8, rows=320, kernel=False),
        "wgrad_bf16": functools.partial(bf16_wgrad_case, False, jnp.bfloat16),
        "wgrad_accumulate": functools.partial(bf16_wgrad_case, True),
        "wide_cluster": functools.partial(bf16_case, True, n=512, k=192, tile_n=256, cluster=2),
        "wide_input_gradient": functools.partial(bf16_case, False, n=256, k=128, tile_n=256),
        "wgrad_wide_accumulate": functools.partial(bf16_wgrad_case, True, n=256, tile_n=256, store_n=64),
        "ragged": functools.partial(bf16_case, True, n=80, k=200),
        "one_step": functools.partial(bf16_case, True, n=128, k=64),
        "ragged_input_gradient": functools.partial(bf16_case, False, n=80, k=200),
        "ragged_wgrad": functools.partial(bf16_wgrad_case, True, m=80, n=150),
    }


@pytest.mark.parametrize("alignment", [1, 8, 128])
def test_row_groups_lay_out_aligned_segments(alignment):
    sizes = np.array([3, 0, 130, 128], np.int32)
    rows = 640
    expected, row = np.full(rows, -1), 0
    for group, size in enumerate(sizes):
        expected[row : row + size] = group
        row += -(-size // alignment) * alignment
    got = row_groups(jnp.asarray(sizes), rows, alignment)
    np.testing.assert_array_equal(got, expected)
    tiles = tile_groups(got, alignment)
    assert tiles.shape == (rows // alignment,)
    np.testing.assert_array_equal(tiles, expected.reshape(-1, alignment).max(1))


def test_bad_operands_are_named():
    a, a_scale, _ = quantized(0, (256, 128))
    b, b_scale, _ = quantized(1, (2, 128, 128), SQUARE_BLOCK)
    rows = jnp.zeros(256, jnp.int32)
    sizes = jnp.asarray([128, 128], jnp.int32)
    x, w = jnp.ones((256, 128)), jnp.ones((2, 128, 64))
    for call, message in (
        (lambda: fp8_grouped_gemm(a, a_scale, b, b_scale, rows[:9]), r"group_ids is int32\[9\]"),
        (
            lambda: fp8_grouped_gemm(a, a_scale, b, b_scale, rows, alignment=100),
            "no multiple of alignment=100",
        ),
        (lambda: fp8_grouped_gemm(a, a_scale, b, b_scale[:1], rows), "b_scale has shape"),
        (
            lambda: fp8_grouped_gemm(a, a_scale, b, b_scale, rows, alignment=32, implementation="mosaic"),
            "alignment=32",
        ),
        (lambda: fp8_grouped_gemm_masked(a, a_scale, b, b_scale, sizes), r"expected \[G, M, K\]"),
        (
            lambda: fp8_grouped_wgrad(a, a_scale, a[:, :64], a_scale[:, :1], sizes),
            "a has 128 tokens and b 64",
        ),
        (
            lambda: fp8_grouped_wgrad(a, a_scale, a, a_scale, sizes.astype(jnp.float32)),
            "group_sizes is float32",
        ),
        (lambda: fp8_grouped_wgrad(a, a_scale, a, a_scale, sizes, x), r"accumulate is float32\[256, 128\]"),
        (lambda: grouped_gemm(x, w, rows), "transpose_b=True"),
        (lambda: grouped_gemm(x, w, rows, False, implementation="mosaic"), "the kernel multiplies bfloat16"),
        (lambda: grouped_wgrad(x, x[:128], sizes), "need equal rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(("m", "n"), [(16, 32), (64, 64), (192, 64), (72, 200)])
def test_weight_gradients_of_few_columns_lower_to_the_kernel(m, n):
    """A tile of 64 x 64 would give each warpgroup half a swizzle."""
    a, b = (jax.ShapeDtypeStruct((512, width), jnp.bfloat16) for width in (m, n))
    sizes = jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
    lowered = jax.jit(grouped_wgrad).trace(a, b, sizes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()

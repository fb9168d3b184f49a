"""The FP8 GEMM against float64, in every implementation, and its error against the unquantised product."""

import functools
from typing import ClassVar

import gemm_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemm_oracle import normal, quantized, small
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from op_suite import Case, OpSuite, assert_product, pytest_generate, run

from pallas_kernels.blocks import ROW_TILE, SQUARE_BLOCK
from pallas_kernels.fp8_gemm.ops import fp8_gemm
from pallas_kernels.fp8_gemm.shapes import tile_config
from pallas_kernels.quantize.ops import quantize
from pallas_kernels.testing.metrics import calc_diff, relative_l2
from pallas_kernels.tiles import leave_sms

pytest_generate_tests = pytest_generate


def gemm_case(m, n, k, b_block=SQUARE_BLOCK, out_dtype=jnp.float32, accumulate=False, **tile) -> Case:
    a, a_scale, a64 = quantized(0, (m, k))
    b, b_scale, b64 = quantized(1, (n, k), b_block)
    expected, magnitude = oracle.product(a64, b64)
    c = normal(2, m, n) if accumulate else None
    if accumulate:
        expected, magnitude = (
            expected + np.asarray(c, np.float64),
            magnitude + np.abs(np.asarray(c, np.float64)),
        )

    def call(a, a_scale, b, b_scale, c, implementation):
        return fp8_gemm(a, a_scale, b, b_scale, out_dtype, c, implementation, small(**tile))

    def check(out):
        assert out.dtype == out_dtype
        assert_product(out, expected, magnitude, terms=k + 4)

    return Case(call, (a, a_scale, b, b_scale, c), check)


class TestFp8Gemm(OpSuite):
    cases: ClassVar = {
        "fprop": functools.partial(gemm_case, 256, 256, 384, num_sms=3),
        "fprop_stages_wrap": functools.partial(gemm_case, 128, 128, 512, stages=3),
        "fprop_cluster": functools.partial(gemm_case, 256, 256, 256, num_sms=2, cluster=2),
        "half_block_tile_n": functools.partial(gemm_case, 128, 192, 256, tile_n=64),
        "ragged_rows_bf16": functools.partial(gemm_case, 40, 256, 256, tile_m=64, out_dtype=jnp.bfloat16),
        "wgrad": functools.partial(gemm_case, 128, 128, 384, ROW_TILE),
        "wgrad_accumulate": functools.partial(gemm_case, 128, 256, 256, ROW_TILE, accumulate=True),
        "split_bf16": functools.partial(
            gemm_case, 40, 256, 768, tile_m=64, split_k=2, out_dtype=jnp.bfloat16
        ),
        "split_wgrad": functools.partial(gemm_case, 128, 128, 512, ROW_TILE, accumulate=True, split_k=2),
        "ragged": functools.partial(gemm_case, 30, 150, 200, tile_m=64, tile_n=64),
        "ragged_bf16": functools.partial(gemm_case, 128, 80, 320, out_dtype=jnp.bfloat16),
        "ragged_wgrad_accumulate": functools.partial(gemm_case, 100, 150, 200, ROW_TILE, accumulate=True),
    }


@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
def test_promotes_every_128_in_order(implementation):
    """2^24 + 1 + 1 in float32 stays 2^24 if the blocks are added one by one, in order; added otherwise it is more."""
    x = np.zeros((128, 384), np.float32)
    x[:, 0], x[:, 128], x[:, 256] = 2.0**12, 1, 1  # the one column of each block that both operands have
    w = x.copy()
    x[:, 1::128] = (
        448 * x[:, 0::128]
    )  # these make every scale a power of two, and meet zeros in the other operand
    w[:, 2::128] = 448 * w[:, 0::128]
    (a, a_scale), (b, b_scale) = quantize(jnp.asarray(x)), quantize(jnp.asarray(w), SQUARE_BLOCK)

    def call(a, a_scale, b, b_scale, implementation):
        return fp8_gemm(a, a_scale, b, b_scale, jnp.float32, None, implementation, small())

    np.testing.assert_array_equal(np.asarray(run(call, implementation, a, a_scale, b, b_scale)), 2.0**24)


DIFF_BAND = (
    6.5e-4,
    7.5e-4,
)  # where correct fine-grained FP8 products of Gaussian data land at 128 x 512 outputs
CONTRACTIONS = (512, 576, 1536, 2048, 2112, 4096, 7168, 16384, 24576, 32768)  # of the model's projections
RECIPES = {"1d2d": (SQUARE_BLOCK, "fp32"), "1d2d_ue8m0": (SQUARE_BLOCK, "ue8m0"), "1d1d": (ROW_TILE, "fp32")}


@functools.partial(jax.jit, static_argnames=("b_block", "scale"))
def quantized_product(x, w, b_block, scale):
    return fp8_gemm(*quantize(x, scale=scale), *quantize(w, b_block, scale), jnp.float32)


@pytest.fixture(scope="module")
def gaussian():
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((rows, max(CONTRACTIONS)), np.float32) for rows in (128, 512))


@pytest.mark.parametrize(
    ("k", "recipe"),
    [(k, "1d2d") for k in CONTRACTIONS] + [(k, r) for k in (576, 7168) for r in ("1d2d_ue8m0", "1d1d")],
)
def test_error_of_quantisation_is_in_its_band(k, recipe, gaussian):
    x, w = (array[:, :k] for array in gaussian)
    out, exact = quantized_product(x, w, *RECIPES[recipe]), x @ w.T
    assert DIFF_BAND[0] < calc_diff(out, exact) < DIFF_BAND[1]
    assert 0.036 < relative_l2(out, exact) < 0.039


@pytest.mark.parametrize(
    ("m", "n", "k", "parts"),
    [
        (64, 2112, 7168, 4),
        (128, 4096, 7168, 4),
        (64, 7168, 16384, 2),
        (64, 7168, 2048, 1),
        (4096, 2112, 7168, 1),
    ],
)
def test_few_rows_split_the_contraction_among_the_sms(m, n, k, parts):
    """Which fit into one wave of an H100's 132: 33 x 4, 32 x 4 and 56 x 2; 16 steps are too few to split."""
    assert tile_config(m, n, k).split_k == parts


def test_clusters_must_divide_the_tiles():
    a, a_scale, _ = quantized(0, (128, 128))
    b, b_scale, _ = quantized(1, (384, 128), SQUARE_BLOCK)
    with pytest.raises(ValueError, match="3 tiles along N do not divide into clusters of 2"):
        fp8_gemm(a, a_scale, b, b_scale, implementation="mosaic", config=small(cluster=2))


@pytest.mark.parametrize(
    ("sms", "left", "blocks"), [(132, 0, 132), (114, 0, 114), (78, 20, 58), (78, 21, 56)]
)
def test_the_grid_takes_the_sms_of_the_device_that_are_left(sms, left, blocks):
    """H100 SXM and PCIe, H20; thread blocks go by pairs where they share tiles."""
    device = AbstractDevice("NVIDIA of the Hopper kind", sms, platform="gpu")
    e4m3, f32 = jnp.float8_e4m3fn, jnp.float32
    operands = [
        jax.ShapeDtypeStruct(*array)
        for array in (((4096, 256), e4m3), ((4096, 2), f32), ((512, 256), e4m3), ((4, 2), f32))
    ]
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)), leave_sms(left):
        traced = jax.make_jaxpr(lambda *xs: fp8_gemm(*xs, implementation="mosaic"))(*operands)
    assert f"grid=({blocks // 2},), grid_names=('sm',), cluster=(2,)" in str(traced)


def test_bad_operands_are_named():
    a, a_scale, _ = quantized(0, (4, 256))
    b, b_scale, _ = quantized(1, (256, 256), SQUARE_BLOCK)
    for call, message in (
        (lambda: fp8_gemm(a.astype(jnp.float32), a_scale, b, b_scale), "a is float32"),
        (lambda: fp8_gemm(a[:, :128], a_scale, b, b_scale), "a contracts 128 and b 256"),
        (lambda: fp8_gemm(a, a_scale.T, b, b_scale), r"a_scale has shape \(2, 4\)"),
        (lambda: fp8_gemm(a, a_scale, b, b_scale[:1]), r"b_scale has shape \(1, 2\)"),
        (lambda: fp8_gemm(a, a_scale, b, b_scale, accumulate=jnp.zeros((4, 256))), "out_dtype bfloat16"),
        (lambda: fp8_gemm(a, a_scale, b, b_scale, jnp.float16, implementation="mosaic"), "out_dtype=float16"),
        (lambda: fp8_gemm(a[:0], a_scale[:0], b, b_scale, implementation="mosaic"), "M=0, N=256, K=256"),
        (lambda: small(tile_m=100), "tile 100 x 128"),
        (lambda: small(stages=1), "stages=1"),
        (lambda: small(cluster=2, num_sms=3), "cluster=2 with num_sms=3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_calc_diff():
    assert calc_diff([0, 0], [0, 0]) == 0
    assert calc_diff([1, 2], [1, 2]) == 0
    assert calc_diff([1, 0], [0, 1]) == 1
    assert np.isnan(calc_diff([np.nan], [1]))
    with pytest.raises(ValueError, match="1 against 2 elements"):
        calc_diff([1], [1, 2])

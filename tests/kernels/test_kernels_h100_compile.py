"""Every kernel at production shapes, compiled to sm_90a machine code on a machine without a GPU."""

import pytest

from pallas_kernels.fp8_gemm.shapes import GemmShape
from pallas_kernels.fp8_grouped_gemm.shapes import GroupedShape
from pallas_kernels.quantize.shapes import QuantizeShape
from pallas_kernels.testing.aot import CaseReport, KernelReport, compile_for_h100, why_unavailable
from pallas_kernels.testing.workloads import Workload, workload, workloads

pytestmark = [
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("optimised"),
]
SAME_CONFIGURATION = (
    "8x4096",
    "dense",
    "attention_output",
    "_q2",
    "b1_",
    "h16_fp8",
)  # names of shapes whose configuration another shape has too
WGMMA = {
    "fp8_gemm": "f32.e4m3.e4m3",
    "fp8_grouped_gemm": "f32.e4m3.e4m3",
    "grouped_gemm": "f32.bf16.bf16",
    "mla_decode": "f32.bf16.bf16",
}
SHIPPED = {
    op: [w for w in shapes if not any(part in w.name for part in SAME_CONFIGURATION)]
    for op, shapes in workloads().items()
    if op != "mla_attention"  # test_attention_for_h100.py
}
UE8M0 = [
    workload("quantize", QuantizeShape("ue8m0", *shape), scale="ue8m0")
    for shape in (
        *(("quantize", 4096, 7168, block) for block in ((1, 128), (128, 1), (128, 128))),
        ("swiglu_quantize", 4096, 2048),
        ("requantize_transposed", 4096, 7168),
    )
]
RAGGED = [  # input gradient of V3's wkv_a; experts of configs/small_1b.py; widths of both
    workload("fp8_gemm", GemmShape("wkv_a", 4096, 7168, 576)),
    workload("fp8_grouped_gemm", GroupedShape("narrow", "contiguous", 8, 1024, 320, 1024)),
    workload("fp8_grouped_gemm", GroupedShape("wide", "contiguous", 8, 1024, 1024, 320)),
    workload("fp8_grouped_gemm", GroupedShape("wgrad", "wgrad", 8, 320, 1024, 1024)),
    workload("grouped_gemm", GroupedShape("narrow", "contiguous", 8, 1024, 320, 1024)),
    workload("grouped_gemm", GroupedShape("narrow", "contiguous", 8, 1024, 320, 1024), transpose_b=False),
    workload("grouped_gemm", GroupedShape("wgrad", "wgrad", 8, 320, 1024, 1024)),
    workload("quantize", QuantizeShape("wkv_a", "quantize", 7168, 576, (128, 128))),
    workload("quantize", QuantizeShape("swiglu", "swiglu_quantize", 4096, 320)),
    workload("quantize", QuantizeShape("transposed", "quantize_transposed", 4096, 288)),
    workload("quantize", QuantizeShape("requantized", "requantize_transposed", 4096, 576)),
]


def assert_clean(report: CaseReport) -> KernelReport:
    assert report.error is None, report.error
    assert all(kernel.spill_bytes == 0 and not kernel.serialised for kernel in report.kernels), report.kernels
    kernel = max(
        report.kernels, key=lambda kernel: kernel.shared_bytes
    )  # others combine what it computed in pieces
    assert kernel.tma and kernel.blocks_per_sm >= 1
    return kernel


@pytest.mark.parametrize("op", SHIPPED)
def test_shipped_configurations_compile_clean(op):
    shapes: list[Workload] = SHIPPED[op]
    for report in compile_for_h100(shapes):
        kernel = assert_clean(report)
        if op in WGMMA:
            assert kernel.wgmma and all(kind.endswith(WGMMA[op]) for kind in kernel.wgmma), kernel.wgmma
            assert kernel.threads == 384
            assert kernel.multicast or op in ("fp8_gemm", "mla_decode")  # few rows have no neighbour


def test_power_of_two_scales_compile_clean():
    for report in compile_for_h100(UE8M0):
        assert_clean(report)


def test_padded_shapes_compile_clean():
    for report in compile_for_h100(RAGGED):
        assert_clean(report)


def test_bad_configurations_are_told_apart():
    shape = GemmShape("bad", 4096, 4096, 7168)
    configs = ({"tile_m": 256, "stages": 3}, {"stages": 8})
    spills, too_large = compile_for_h100([workload("fp8_gemm", shape, config=config) for config in configs])
    [kernel] = spills.kernels
    assert kernel.spill_bytes > 0 and not kernel.clean
    assert "exceeds available shared memory" in too_large.error

"""Every kernel at production shapes, compiled to sm_90a machine code on a machine without a GPU."""

import pytest

from pallas_kernels.testing.aot import CaseReport, KernelReport, compile_for_h100, why_unavailable
from pallas_kernels.testing.workloads import Workload, workloads

pytestmark = [
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("optimised"),
]
SAME_CONFIGURATION = (
    "m128",
    "8x4096",
    "attention_output",
)  # names of shapes whose configuration another shape has too
WGMMA = {"fp8_gemm": "f32.e4m3.e4m3", "fp8_grouped_gemm": "f32.e4m3.e4m3", "grouped_gemm": "f32.bf16.bf16"}
SHIPPED = {
    op: [w for w in shapes if not any(part in w.name for part in SAME_CONFIGURATION)]
    for op, shapes in workloads().items()
}
UE8M0 = [
    ("quantize", {"m": 4096, "k": 7168, "block": block, "scale": "ue8m0"})
    for block in ((1, 128), (128, 1), (128, 128))
] + [
    ("swiglu_quantize", {"m": 4096, "f": 2048, "scale": "ue8m0"}),
    ("requantize_transposed", {"t": 4096, "k": 7168}),
]
RAGGED = [  # input gradient of V3's wkv_a; experts of configs/small_1b.py; widths of both
    ("fp8_gemm", {"m": 4096, "n": 7168, "k": 576}),
    ("fp8_grouped_gemm", {"groups": 8, "m": 1024, "n": 320, "k": 1024}),
    ("fp8_grouped_gemm", {"groups": 8, "m": 1024, "n": 1024, "k": 320}),
    ("fp8_grouped_wgrad", {"groups": 8, "m": 320, "n": 1024, "k": 1024}),
    ("grouped_gemm", {"groups": 8, "m": 1024, "n": 320, "k": 1024}),
    ("grouped_gemm", {"groups": 8, "m": 1024, "n": 320, "k": 1024, "transpose_b": False}),
    ("grouped_wgrad", {"groups": 8, "m": 320, "n": 1024, "k": 1024}),
    ("quantize", {"m": 7168, "k": 576, "block": (128, 128)}),
    ("swiglu_quantize", {"m": 4096, "f": 320}),
    ("quantize_transposed", {"t": 4096, "k": 288}),
    ("requantize_transposed", {"t": 4096, "k": 576}),
]


def assert_clean(report: CaseReport) -> KernelReport:
    assert report.error is None, report.error
    [kernel] = report.kernels
    assert kernel.spill_bytes == 0 and not kernel.serialised, f"{report.case} {report.arguments}: {kernel}"
    assert kernel.tma and kernel.blocks_per_sm >= 1
    return kernel


@pytest.mark.parametrize("op", SHIPPED)
def test_shipped_configurations_compile_clean(op):
    shapes: list[Workload] = SHIPPED[op]
    for report in compile_for_h100([w.case for w in shapes]):
        kernel = assert_clean(report)
        if op in WGMMA:
            assert kernel.wgmma and all(kind.endswith(WGMMA[op]) for kind in kernel.wgmma), kernel.wgmma
            assert kernel.threads == 384


def test_power_of_two_scales_compile_clean():
    for report in compile_for_h100(UE8M0):
        assert_clean(report)


def test_padded_shapes_compile_clean():
    for report in compile_for_h100(RAGGED):
        assert_clean(report)


def test_bad_configurations_are_told_apart():
    shape = {"m": 4096, "n": 4096, "k": 7168}
    spills, too_large = compile_for_h100(
        [
            ("fp8_gemm", shape | {"config": {"tile_n": 256, "stages": 3}}),
            ("fp8_gemm", shape | {"config": {"stages": 8}}),
        ]
    )
    [kernel] = spills.kernels
    assert kernel.spill_bytes > 0 and not kernel.clean
    assert "exceeds available shared memory" in too_large.error

"""The benchmark's parts that need no GPU: checks, timing, roofline, tables; measured here on the CPU's XLA path."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest

from pallas_kernels import bench
from pallas_kernels.fp8_gemm.shapes import GemmShape
from pallas_kernels.fp8_grouped_gemm.shapes import GroupedShape
from pallas_kernels.quantize.shapes import QuantizeShape
from pallas_kernels.testing.aot import KernelReport
from pallas_kernels.testing.measure import check, measure
from pallas_kernels.testing.metrics import calc_diff, calc_diff_on_device
from pallas_kernels.testing.timing import each, input_sets
from pallas_kernels.testing.workloads import workload, workloads

SMALL = {
    "gemm": workload("fp8_gemm", GemmShape("small", 128, 512, 512)),
    "gemm_wgrad": workload("fp8_gemm", GemmShape("small", 128, 512, 512, "1d1d", True)),
    "contiguous": workload("fp8_grouped_gemm", GroupedShape("small", "contiguous", 2, 128, 256, 256)),
    "masked": workload("fp8_grouped_gemm", GroupedShape("small", "masked", 2, 128, 256, 256, rows=96)),
    "wgrad": workload("fp8_grouped_gemm", GroupedShape("small", "wgrad", 2, 128, 256, 512)),
    "bf16": workload("grouped_gemm", GroupedShape("small", "contiguous", 2, 128, 256, 256)),
    "bf16_dgrad": workload(
        "grouped_gemm", GroupedShape("small", "contiguous", 2, 128, 256, 256), transpose_b=False
    ),
    "bf16_wgrad": workload("grouped_gemm", GroupedShape("small", "wgrad", 2, 128, 256, 256)),
    "swiglu": workload("quantize", QuantizeShape("small", "swiglu_quantize", 64, 128)),
    "requantize": workload("quantize", QuantizeShape("small", "requantize_transposed", 128, 128)),
}


@pytest.mark.parametrize("name", SMALL)
def test_workloads_are_correct(name):
    diff, correct = check(SMALL[name], "xla")
    assert correct, diff


def test_check_notices_a_wrong_result():
    right = workload("fp8_gemm", GemmShape("small", 128, 128, 256))
    off = dataclasses.replace(right, run=lambda *xs: right.run(*xs) * 1.1)
    exact = dataclasses.replace(right, run=lambda *xs: right.exact(*right.make(0)))
    assert not check(off, "xla")[1]
    assert not check(exact, "xla")[1]  # not quantised at all


def test_measure_reports_consistent_figures():
    gemm = SMALL["gemm"]
    m = measure(gemm, "xla", torch_peer=False, repeats=3)
    assert m.correct and m.torch_ratio is None
    assert m.tflops * m.seconds == pytest.approx(gemm.flops / 1e12)
    assert m.gb_s * m.seconds == pytest.approx(gemm.bytes / 1e9)
    assert m.bound_share == pytest.approx(gemm.bound_seconds / m.seconds)
    row = {name: column(m) for name, column in bench.MEASURED.items()}
    assert (row["correct"], row["x torch"], row["us"]) == ("yes", "-", f"{m.seconds * 1e6:.1f}")


def test_what_is_timed_calls_every_set():
    """In the compiled program too: a call that is dropped or merged with another would take no time."""
    sets = [(jnp.full((8, 8), float(i)), None) for i in range(3)]
    run = each(lambda x, none: x @ x)
    assert [float(y[0, 0]) for y in run(sets)] == [0, 8, 32]
    calls = re.findall(r" = f32\[8,8\]\S* (?:dot|call|custom-call)\(", run.lower(sets).compile().as_text())
    assert len(calls) == 3
    assert len(input_sets(lambda seed: (jnp.zeros(2**20),))) == 16
    assert len(input_sets(lambda seed: (jnp.zeros(2**20),), memory_bytes=2**23)) == 2


def test_roofline_bounds():
    by_name = {(op, s.name): s for op, shapes in workloads().items() for s in shapes}
    assert by_name["fp8_gemm", "o_m4096"].bound_by == "compute"
    assert by_name["fp8_gemm", "o_m4096"].bound_seconds == pytest.approx(2 * 4096 * 7168 * 16384 / 1979e12)
    decode = by_name["fp8_gemm", "shared_gate_up_m64"]
    assert decode.bound_by == "memory"
    assert decode.bytes == (64 + 4096) * 7168 + 64 * 4096 * 2
    assert by_name["quantize", "hidden"].bytes == 4096 * 7168 * 3 + 4096 * 56 * 4
    assert all(s.bound_seconds > 0 for s in by_name.values())


def test_occupancy_is_bounded_by_the_scarcest_resource():
    kernel = KernelReport(168, 0, False, 100_000, 384, (), True)
    assert kernel.blocks_per_sm == 1  # 64512 of 65536 registers
    assert KernelReport(32, 0, False, 100_000, 128, (), True).blocks_per_sm == 2  # shared memory
    assert KernelReport(16, 0, False, 1_000, 512, (), True).blocks_per_sm == 4  # 2048 threads


def test_calc_diff_on_device_agrees():
    x, y = jnp.linspace(-1, 1, 1000), jnp.linspace(-1, 1.01, 1000)
    assert float(calc_diff_on_device(x, y)) == pytest.approx(calc_diff(x, y), rel=1e-4)
    assert float(calc_diff_on_device(0 * x, 0 * y)) == 0


def test_command_without_compiler_prints_the_bounds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "why_unavailable", lambda: "no compiler here")
    assert bench.main(["--op=fp8_gemm", "--shape=o_m4096", f"--out={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "No compilation for H100: no compiler here" in text and "| o_m4096 |" in text
    assert (tmp_path / "bench.md").read_text().strip() == text.strip()
    [result] = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert result["name"] == "o_m4096" and result["error"] == "no compiler here"
    with pytest.raises(SystemExit):
        bench.main(["--op=fp8_gemm", "--shape=nothing"])

"""The benchmark's parts that need no GPU: checks, timing, roofline, tables; measured here on the CPU's XLA path."""

import dataclasses
import json
import re
import sys
import time

import jax.numpy as jnp
import pytest

from pallas_kernels import bench
from pallas_kernels.fp8_gemm.shapes import GemmShape
from pallas_kernels.fp8_grouped_gemm.shapes import GroupedShape
from pallas_kernels.mla_attention.shapes import AttentionShape
from pallas_kernels.mla_decode.shapes import DecodeShape
from pallas_kernels.quantize.shapes import QuantizeShape
from pallas_kernels.testing import day, worker
from pallas_kernels.testing.aot import KernelReport
from pallas_kernels.testing.measure import check, compile_once, measure
from pallas_kernels.testing.metrics import calc_diff, calc_diff_on_device
from pallas_kernels.testing.timing import each, num_sets
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
    "attention": workload("mla_attention", AttentionShape("small", "forward", 1, 2, 96, queries=32)),
    "attention_backward": workload(
        "mla_attention", AttentionShape("small", "backward", 1, 2, 96, documents=2)
    ),
    "decode": workload("mla_decode", DecodeShape("small", 2, 128, 2, heads=4, latent=128)),
    "decode_fp8": workload("mla_decode", DecodeShape("small", 2, 128, heads=4, kind="fp8", latent=128)),
    "swiglu": workload("quantize", QuantizeShape("small", "swiglu_quantize", 64, 128)),
    "requantize": workload("quantize", QuantizeShape("small", "requantize_transposed", 128, 128)),
}


@pytest.mark.parametrize("name", SMALL)
def test_workloads_are_correct(name):
    diff, correct = check(SMALL[name], compile_once(SMALL[name], "xla"))
    assert correct, diff


def test_check_notices_a_wrong_result():
    right = workload("fp8_gemm", GemmShape("small", 128, 128, 256))
    off = dataclasses.replace(right, run=lambda *xs: right.run(*xs) * 1.1)
    exact = dataclasses.replace(right, run=lambda *xs: right.exact(*right.make(0)))
    assert not check(off, compile_once(off, "xla"))[1]
    assert not check(exact, compile_once(exact, "xla"))[1]  # not quantised at all


def test_measure_reports_consistent_figures():
    gemm = SMALL["gemm"]
    m = measure(gemm, "xla", torch_peer=False, repeats=3)
    assert m.correct and m.torch_ratio is None
    assert m.tflops * m.seconds == pytest.approx(gemm.flops / 1e12)
    assert m.gb_s * m.seconds == pytest.approx(gemm.bytes / 1e9)
    assert m.bound_share == pytest.approx(gemm.bound_seconds / m.seconds)
    row = {name: column(dataclasses.asdict(m)) for name, column in bench.MEASURED.items()}
    assert (row["correct"], row["x torch"], row["us"]) == ("yes", "-", f"{m.seconds * 1e6:.1f}")
    assert row["registers"] == "-"


def test_what_is_timed_calls_every_set():
    """In the compiled program too: a call that is dropped or merged with another would take no time."""
    sets = [(jnp.full((8, 8), float(i)), None) for i in range(3)]
    run = each(lambda x, none: x @ x)
    assert [float(y[0, 0]) for y in run(sets)] == [0, 8, 32]
    calls = re.findall(r" = f32\[8,8\]\S* (?:dot|call|custom-call)\(", run.lower(sets).compile().as_text())
    assert len(calls) == 3
    assert num_sets(jnp.zeros(2**20)) == 16
    assert num_sets(jnp.zeros(2**20), memory_bytes=2**23) == 2


def test_roofline_bounds():
    by_name = {(op, s.name): s for op, shapes in workloads().items() for s in shapes}
    assert by_name["fp8_gemm", "o_m4096"].bound_by == "compute"
    assert by_name["fp8_gemm", "o_m4096"].bound_seconds == pytest.approx(2 * 4096 * 7168 * 16384 / 1979e12)
    decode = by_name["fp8_gemm", "shared_gate_up_m64"]
    assert decode.bound_by == "memory"
    assert decode.bytes == (64 + 4096) * 7168 + 64 * 4096 * 2
    packed = by_name["mla_attention", "v3_4k_packed"]  # 8 documents of 512 tokens
    assert packed.flops == 2 * 128 * 8 * (512 * 513 // 2) * (192 + 128) and packed.bound_by == "memory"
    chunk = by_name["mla_attention", "v3_chunk"]  # 1,024 queries that see 7,168 keys before the first
    assert chunk.flops == 2 * 128 * (1024 * 7168 + 1024 * 1025 // 2) * (192 + 128)
    attention = by_name["mla_decode", "b128_s4096_q2"]  # 256 rows: twice what reading a key pays for
    assert attention.bound_by == "compute" and attention.flops == 2 * 128 * 256 * 4096 * (576 + 512)
    assert by_name["mla_decode", "b128_s8192_h16"].bound_by == "memory"
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
    assert "No compilation for H100: no compiler here" in text and "| fp8_gemm | o_m4096 |" in text
    assert (tmp_path / "bench.md").read_text().strip() == text.strip()
    [result] = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert result["name"] == "o_m4096" and result["error"] == "no compiler here"
    with pytest.raises(SystemExit):
        bench.main(["--op=fp8_gemm", "--shape=nothing"])


# --- a day on a GPU, on this machine's CPU --------------------------------------------------------------------------


def run_day(items, folder, seconds=100.0):
    found = []
    one = day.Day(items, time.monotonic() + seconds, found.append, folder)
    one.run(workers=2)
    return found, one.left


def test_a_day_measures_goes_on_behind_a_failure_and_says_what_is_left(tmp_path):
    """Two workers, the second shape refused by its op: the others are measured, what has not begun in time is left."""
    good = day.item(SMALL["swiglu"], "xla", repeats=1)
    bad = day.item(SMALL["gemm"], "no such implementation", repeats=1)
    found, left = run_day([good, bad], tmp_path)
    by_op = {r["op"]: r for r in found}
    assert by_op["quantize"]["correct"] and by_op["quantize"]["seconds"] > 0 and not left
    assert "'no such implementation' is unknown" in by_op["fp8_gemm"]["error"]
    assert run_day([good], tmp_path, seconds=0.0) == ([], [good])


def worker_that(does, folder, monkeypatch):
    """A worker whose process runs the program `does`."""
    monkeypatch.setattr(worker, "COMMAND", [sys.executable, "-c", does])
    return worker.Worker(folder / "worker.log")


@pytest.mark.parametrize(
    "does,error",
    [
        (
            'import time; print(chr(123) + \'"phase": "compile"\' + chr(125), flush=True); time.sleep(60)',
            "killed: compile",
        ),
        ("import sys; sys.stdin.readline(); sys.exit(7)", "died with status 7"),
    ],
)
def test_a_kernel_that_hangs_or_breaks_its_process_costs_one_shape(does, error, tmp_path, monkeypatch):
    one = worker_that(does, tmp_path, monkeypatch)
    found = one.ask(day.item(SMALL["gemm"]), time.monotonic() + 1.0)
    assert error in found["error"]
    assert one._process.poll() is not None


def test_what_no_gpu_has_run_comes_first_then_the_slowest():
    shapes = [w for ws in workloads().values() for w in ws]
    reached = {("fp8_gemm", w.name): 0.1 * i for i, w in enumerate(workloads()["fp8_gemm"])}
    ordered = day.in_order(shapes, reached)
    assert sorted(map(id, ordered)) == sorted(map(id, shapes))
    new = [w.op for w in ordered if w.op != "fp8_gemm"]
    assert [w.op for w in ordered[: len(new)]] == new
    assert len(set(new[: len(set(new))])) == len(set(new))  # one of each op before a second of any
    shares = [reached[w.op, w.name] for w in ordered[len(new) :]]
    assert shares == sorted(shares)


def test_a_changed_kernel_has_not_run(tmp_path):
    for name in ("kernel.py", "shapes.py"):
        (tmp_path / "op").mkdir(exist_ok=True)
        (tmp_path / "op" / name).write_text("from pallas_kernels.matmul import x\n")
    (tmp_path / "matmul.py").write_text("1\n")
    before = day.digest("op", tmp_path)
    (tmp_path / "matmul.py").write_text("2\n")
    assert day.digest("op", tmp_path) != before
    figures = json.loads(day.MEASURED.read_text())
    assert {r["op"] for r in figures["results"]} == set(figures["sources"])
    for op, _ in day.last_figures():
        assert day.digest(op) == figures["sources"][op]


def test_a_report_of_a_day_is_short_and_whole_in_its_files(tmp_path):
    ops = ("fp8_gemm", "quantize", "grouped_gemm")
    shapes = [(ops[i % 3], f"shape{i}") for i in range(200)]
    order = {key: i for i, key in enumerate(shapes)}
    report = bench.Report("device", ["op", "shape"], order, tmp_path)
    for op, name in reversed(shapes):
        report.add([op, name], {"op": op, "name": name})
    for i in range(20):
        report.add(None, {"op": "quantize", "name": f"bad{i}", "error": "wgmma " * 100})
    report.model = ["line"] * 100
    report.write()
    text = report.text(short=True)
    assert len(text.splitlines()) <= 150 and "110 further rows are in bench.md" in text
    whole = (tmp_path / "bench.md").read_text()
    assert [line.split()[3] for line in whole.splitlines() if line.startswith("|")][2:] == [
        n for _, n in shapes
    ]
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == 220


def test_the_model_part_is_stopped_when_the_time_is_up(tmp_path, monkeypatch):
    program = "import time; print('first line', flush=True); time.sleep(60)"
    monkeypatch.setattr(bench, "MODEL", ("json", [sys.executable, "-c", program]))
    monkeypatch.setattr(bench, "GRACE_S", 1.0)
    model, told = bench.Model(tmp_path, time.monotonic()), []
    assert model.wait(told.append) == ["first line", "ended with status -9; see model.log"]
    assert re.fullmatch(r"waiting for the model, at most [01] s; its lines so far are in .*model.md", told[0])

"""The part of a GPU day that runs the model, with the smallest run on this machine's CPU."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from experiments import bench_gpu
from experiments.study.kernel_shares import kind, labels
from tests.tiny_run import tiny

CFG = tiny(model={"num_nextn_predict_layers": 0, "num_hidden_layers": 1, "first_k_dense_replace": 0})


@pytest.fixture(scope="module")
def trained():
    return bench_gpu.train(CFG, 4)


def test_steps_are_trained_timed_and_their_kernels_named(trained):
    assert len(trained.losses) == 4 and trained.losses[-1] < trained.losses[0]
    # random weights say next to nothing
    assert trained.losses[0] == pytest.approx(math.log(384), rel=0.05)
    assert 0 < trained.step_s < trained.compile_s
    assert sum(trained.shares.values()) == pytest.approx(1)
    assert not {"while", "conditional", "call"} & set(trained.shares)
    assert any("dot" in kernel or "fusion" in kernel for kernel in trained.shares)
    line = bench_gpu.trained_line("tiny", CFG, trained)
    assert f"{4 * 32 / trained.step_s:,.0f} tokens/s\n" in line  # no MFU: a CPU has no peak


def test_kernels_of_ours_go_by_their_names():
    program = """
ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2] parameter(0)
  %mpmd_map.7 = f32[2] custom-call(%a), metadata={op_name="jit(f)/cond/branch_0_fun/jit(fp8_gemm)/body/mpmd_map"}
  %loop_add_fusion.12 = f32[2] fusion(%mpmd_map.7), metadata={op_name="jit(f)/add"}
}
"""
    found = labels(program)
    assert (found["mpmd_map.7"], found["loop_add_fusion.12"]) == ("fp8_gemm", "loop_add_fusion")
    assert kind("wrapped_slice.3.clone.1") == "wrapped_slice"


@pytest.mark.parametrize(
    ("cpu", "verdict"),
    [([6.0, 5.0], "first losses agree"), ([6.1, 5.0], "DISAGREE"), (None, "no losses of a CPU")],
)
def test_losses_stand_beside_the_cpus(cpu, verdict):
    program = f"print({json.dumps(cpu)!r})" if cpu else "raise SystemExit(3)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    line = bench_gpu.beside_cpu("tiny FP8", [6.01, 5.2], process, 20.0)
    assert verdict in line and process.returncode is not None
    if cpu:
        assert f"at most {np.abs(np.subtract([6.01, 5.2], cpu)).max():.4f} apart" in line


def test_configs_fit_one_device():
    for name in ("tiny", "small_1b"):
        cfg = bench_gpu.config(name, "deepseek_fp8")
        assert (cfg.model.dtype, cfg.train.batch_size, cfg.train.grad_accumulation) == ("bfloat16", 8, 1)


def test_what_fails_or_is_left_is_said(monkeypatch, capsys):
    def fails(cfg, *_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(bench_gpu, "train", fails)
    monkeypatch.setattr(bench_gpu, "decode", lambda cfg, batch: 10.0 * batch)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert bench_gpu.run(100.0) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "no GPU: a few steps on this CPU, whose speeds say nothing of a GPU's"
    assert "tiny FP8: train failed: RuntimeError: out of memory" in lines
    assert "tiny BF16: decode, batch 8: 80 tokens/s" in lines
    assert bench_gpu.run(-1.0) == 1
    assert "tiny BF16: time is up, train is left" in capsys.readouterr().out

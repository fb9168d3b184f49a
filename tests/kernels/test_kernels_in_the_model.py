"""On an H100 the routed experts are grouped kernels, forward and backward, in BF16 and in FP8: nothing falls back."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels.testing.aot import ROOT, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

SCRIPT = pathlib.Path(__file__).with_name("experts_for_h100.py")


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("optimised")
def test_routed_experts_run_on_the_grouped_kernels():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(SCRIPT), "bf16", "deepseek_fp8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, fp8 = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    # gate and up, down; input and weight gradients of both
    assert plain == {"kernels": {"grouped_gemm": 4, "grouped_wgrad": 2}, "other products": 0}
    assert fp8["other products"] == 0
    kernels = fp8["kernels"]
    assert (kernels["fp8_grouped_gemm"], kernels["fp8_grouped_wgrad"]) == (4, 2)
    # three weights, input, gate and up to keep, output gradient, gradient of gate and up; x and dy along the tokens;
    # SwiGLU output, gradient of gate and up along the tokens
    assert (kernels["swiglu_quantize"], kernels["requantize_transposed"], kernels["quantize_transposed"]) == (
        1,
        2,
        2,
    )
    assert kernels["quantize"] == 7

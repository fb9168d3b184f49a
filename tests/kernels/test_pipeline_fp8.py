"""FP8 over a pipeline is the same quantised function as without one, to the rounding of float64.

In float32 the two agree but for values that fall on the other side of a border of E4M3 (`tests/float64.py`).
"""

import subprocess
import sys

import jax
import pytest

from tests.parallel.pipeline.check import CASES

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="half a minute, once: beside the kernels' tests on the newer jax"
)
CASE = "fp8, two layers"


def test_a_pipelined_step_in_fp8():
    """Gradients and metrics of four steps within 3.7e-15, loads and the router's bias equal; split backward passes,
    recomputation, tokens that travel."""
    assert CASE in CASES
    command = [sys.executable, "-m", "tests.float64", "tests.parallel.pipeline.check", f"--only={CASE}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "holds" in done.stdout and "float64" in done.stdout

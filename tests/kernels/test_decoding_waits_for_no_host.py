"""A decoding step over several hosts of H100s, compiled without a GPU: nothing in it waits for the host."""

import os
import subprocess
import sys

import pytest

from pallas_kernels.testing.aot import ROOT, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@pytest.mark.timeout(400)
def test_a_decoding_step_over_two_hosts():
    """With layers that are scanned, FP8 weights and rows, experts, and a draw with top-p."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.plan", "waits", "decoding", "--nodes=2", "--vocab=4096"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["decoding:", "  nothing waits for the host"]

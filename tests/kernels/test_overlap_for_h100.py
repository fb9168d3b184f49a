"""On 64 H100s every dispatch and combine of the overlapped layers is asynchronous, around GEMMs."""

import os
import re
import subprocess
import sys

import pytest

from pallas_kernels.testing.aot import ROOT, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("precision", ["bf16", "deepseek_fp8"])
def test_every_exchange_is_hidden(precision):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.plan", "overlap", f"--precision={precision}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1490)
    assert done.returncode == 0, done.stderr[-3000:]
    in_layer = [line for line in done.stdout.splitlines() if line.endswith("in the layer")]
    trips = [line for line in in_layer if re.match(r" +(forward|backward) +(dispatch|combine) ", line)]
    assert len(trips) == 16, done.stdout  # two hops of two exchanges of two halves, forward and backward
    assert all("async" in line and "hidden" in line for line in trips), done.stdout
    assert "16 of 16" in done.stdout

"""On 144 H100s, what of a decoding layer's exchange is beside computing of the other half."""

import os
import re
import subprocess
import sys

import pytest

from pallas_kernels.testing.aot import ROOT, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@pytest.mark.timeout(400)
def test_ep144_decoding():
    """Eight ways in a layer: two hops, there and back, of two halves. All are asynchronous, and beside GEMMs but for the combines
    inside a node, which the scheduler starts behind the queries that are meant to be beside them."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.plan", "overlap", "decode"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stderr[-3000:]
    in_loop = [line for line in done.stdout.splitlines() if line.startswith("  in the loop")]
    trips = [line for line in in_loop if re.search(r" [ab]\.(dispatch|combine) +(ragged-)?all-to-all", line)]
    assert len(trips) == 8 and all(" async " in line for line in trips), done.stdout
    exposed = [line for line in trips if " hidden " not in line]
    assert all(re.search(r"\.combine .* inside a node ", line) for line in exposed), done.stdout

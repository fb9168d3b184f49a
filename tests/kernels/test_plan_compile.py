"""XLA's own bytes of a step that is compiled for H100s without a GPU, beside the predicted ones."""

import os
import subprocess
import sys

import pytest

from pallas_kernels.testing.aot import ROOT, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@pytest.mark.timeout(600)
def test_the_step_of_a_small_model_over_eight_gpus():
    """Arguments are the state and the batch: master weights and moments, to 1%."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "experiments.plan",
        "step",
        "--config=tests/golden/config.py",
        "--compile",
    ]
    command += [
        "--hardware=h100",
        "--config.mesh.data=8",
        "--config.mesh.zero",
        "--config.train.batch_size=8",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {
        line.strip().split("  ")[0]: line.split()[-2:]
        for line in done.stdout.split("compiled for H100")[1].splitlines()
    }
    arguments, predicted = map(float, found["arguments: state and batch"])
    assert arguments == pytest.approx(predicted, rel=0.01) and float(found["temporaries"][0]) > 0

"""The golden loss curve: 20 steps of the tiny run, kept in the repository.

python -m tests.golden.run --write     # after a change that is meant to change the numbers
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.golden.run import LOSSES, largest_difference

# Relative. Measured against the kept curve, jax 0.12.0 instead of 0.10.2, two devices, and an unoptimised program:
# rounding, up to 6e-7 in the losses and 4e-6 in the gradient's norm over the first ten steps, grows to 4e-4 and 4e-3
# by the twentieth. Ten times the former, four times the latter.
EARLY = {"loss": 3e-6, "mtp_loss": 5e-6, "grad_norm": 4e-5}
TOLERANCE = {"loss": 1.5e-3, "mtp_loss": 1.5e-3, "validation": 1.5e-3, "grad_norm": 1.7e-2}


@pytest.fixture(scope="module")
def got():
    """The curves of a process that compiles as outside of tests, optimised: what is kept was made so."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.golden.run", "--show"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_losses_are_the_golden_ones(got):
    want = json.loads(LOSSES.read_text())
    assert len(want["loss"]) == len(want["mtp_loss"]) == len(want["grad_norm"]) == 20
    difference = largest_difference(got, want)
    assert all(difference[name] < TOLERANCE[name] for name in TOLERANCE), difference
    first = [{name: curve[name][:10] for name in EARLY} for curve in (got, want)]
    difference = largest_difference(*first)
    assert all(difference[name] < EARLY[name] for name in EARLY), difference


def test_the_tolerance_would_show_a_small_change():
    """Neighbouring steps differ by far more, so a run that is one step off, or an update too few, is seen."""
    loss = np.array(json.loads(LOSSES.read_text())["loss"])
    assert np.median(np.abs(loss[1:] / loss[:-1] - 1)) > 3 * TOLERANCE["loss"]


def test_the_run_learns(got):
    loss = got["loss"]
    assert np.mean(loss[-3:]) < np.mean(loss[:3]) - 0.5

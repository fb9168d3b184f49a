"""Mistakes on the command line: one line that names the key, no traceback."""

import os
import subprocess
import sys

import pytest


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("train", ["--config.train.stesp=3"], "unknown config key train.stesp; did you mean train.steps?"),
        ("train", ["--config.train.steps=abc"], "--config.train.steps=abc: invalid literal for int()"),
        ("train", ["--config.optimizer.peak_lr=-1"], "optimizer.peak_lr=-1.0 must be positive"),
        ("train", ["--config=configs/nope.py"], "No such file or directory: 'configs/nope.py'"),
        ("bench", ["train", "--peer_python=/nope/python"], "cannot run '/nope/python'"),
    ],
)
def test_mistakes(module, arguments, message):
    done = run(module, *arguments)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line

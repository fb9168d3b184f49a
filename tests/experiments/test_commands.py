"""Mistakes on the command line: one line that names the value, status 2, no traceback; whichever the command."""

import errno
import os
import subprocess
import sys

import pytest
from absl import flags

from experiments import bench, command_line, kill_test, launch, plan


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
        ("train", ["--from_stp=3"], "there is no flag --from_stp; did you mean --from_step?"),
        ("generate", ["--checkpoint=/nonexistent", "--prompt=\udcff"], "is not UTF-8 text"),
        ("convert", ["--from=hf", "--to=orbax", "--input=/nonexistent", "--output=/x"], "/nonexistent"),
        ("fp8_study", ["--seeds=1"], "seeds"),
    ],
)
def test_mistakes(module, arguments, message):
    done = run(module, *arguments)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (bench, ["train", "--peer_python=/nope/python"], "cannot run '/nope/python'"),
        (bench, ["trian"], "invalid choice: 'trian'"),
        (bench, ["train", "--rounds=0"], "--rounds=0 must be at least 1"),
        (kill_test, ["--kills=0"], "--kills=0 and --steps=300 must be at least 1"),
        (
            kill_test,
            ["--config=nope.py", "--kills=1"],
            "ended with 2: error: No such file or directory: 'nope.py'",
        ),
        (launch, ["--processes=2", "--", "/nonexistent"], "No such file or directory: '/nonexistent'"),
        (launch, ["--processes=2", "--", "/"], "'/'"),
        (launch, ["--processes=1000000", "--", "true"], "--processes=1000000 must lie in [1, 1024]"),
        (launch, ["--processes=1", "--grace=nan", "--", "true"], "--grace=nan must be at least 0 and finite"),
        (launch, ["--processes=x"], "argument --processes: invalid int value: 'x'"),
        (
            launch,
            ["--processes=1", "--grace=--", "--", "true"],
            "argument --grace: expected a value, not '--'",
        ),
        (plan, ["exchnge"], "invalid choice: 'exchnge'"),
        (plan, ["x" * 10_000], "invalid choice: 'xxx"),
        (plan, ["memory", "--config=nope.py"], "No such file or directory: 'nope.py'"),
    ],
)
def test_mistakes_in_this_process(command, arguments, message, capsys):
    assert command_line.status(command.main, arguments) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert len(line) < 800
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\n  lines"), 2, "two lines"),
        (OverflowError("Python int too large"), 2, "Python int too large"),
        (flags.Error("flag"), 2, "flag"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), 2, "File exists: 'a'"),
        (
            OSError(errno.EROFS, "Read-only file system", "a", None, "b"),
            2,
            "Read-only file system: 'a' -> 'b'",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 1, "No space left on device: 'a'"),
        (OSError("no number"), 1, "no number"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_how_a_command_ends(error, status, line, capsys):
    def main(argv):
        raise error

    assert command_line.status(main, []) == status
    assert capsys.readouterr().err == f"error: {line}\n"


def test_what_is_no_users_mistake_is_raised(monkeypatch):
    def main(argv):
        raise ValueError(argv) if argv else AssertionError

    with pytest.raises(AssertionError):
        command_line.status(main, [])
    monkeypatch.setenv("DEEPSEEK_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError):
        command_line.status(main, ["x"])


def test_a_reader_that_has_seen_enough_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m experiments.launch --help | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert done.stderr == ""


COMPILING = """
import jax, jax.numpy as jnp
from deepseek_jax.training.preflight import in_background
from experiments import command_line

def deep(x):
    for _ in range(1000):
        x = jnp.sin(x @ x)
    return x

def main(argv):
    print("begun")
    in_background(jax.jit(deep).lower(jnp.ones((8, 8))).compile)
    if argv == ["stop"]:
        return 0
    raise ValueError("a mistake")

command_line.run(main)
"""


@pytest.mark.parametrize(("argv", "status", "said"), [([], 2, "error: a mistake\n"), (["stop"], 0, "")])
def test_a_command_ends_while_it_compiles(argv, status, said):
    """With its own status and one line: the thread of the compiler would abort the process, status 134."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILING, *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "DEEPSEEK_JAX_CACHE": "off"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "begun\n", said)

"""Runs programs that a model wrote, and tests them, so that they can neither do harm nor cheat.

    sandbox = Sandbox()
    sandbox.check("def f(x):\n    return x + 1", "assert f(1) == 2")     # Verdict(passed=True, ...)

Walls: Linux namespaces (processes, network, mounts, users, IPC), entered by root's right, by bubblewrap, or by those of
users; a root that holds the standard library, read-only, and a scratch folder; a user of its own, no capabilities, a
filter of system calls; limits on memory, time, processes, files and output; an empty environment. A wall clock ends a
program with all that it started. Where the kernel allows no namespaces, nothing is run unless `unsandboxed` says so:
limits alone are no wall.

Tests run in one process, the solution in another; what crosses between them is plain data (`sandboxed/wire.py`). The
tests have passed if their process says a secret after the last of them, which the solution's has never seen.
"""

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import shutil
import socket
import tempfile
from typing import Any, NamedTuple

from deepseek_jax.checks import ranges, require
from deepseek_jax.posttraining import sandbox_process
from deepseek_jax.posttraining.sandbox_process import Ended, Process, last_line, wait

_WALLS = ("namespaces", "bubblewrap")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0  # on the wall's clock, its start included
    memory_mb: int = 512  # address space of a process
    processes: int = 4  # at the same time, threads counted
    file_mb: int = 8  # size of a file; all files together have 16 MB
    output_kb: int = 64  # written to standard output, by functions to standard error as well

    def __post_init__(self):
        ranges("limits", self, "memory_mb", 64, 1 << 20)
        ranges("limits", self, "processes file_mb output_kb", 1, 1 << 20)
        ranges("limits", self, "seconds", 0.1, 86_400)


class Verdict(NamedTuple):
    """Whether the tests passed, and if not, why.

    reason: "passed", "failed" (a test), "time" (the wall clock), "output" (too much of it), "ended" (the tests' process
    ended before their end), "status" (a program that should read and write ended with another status than 0).
    """

    passed: bool
    reason: str
    detail: str = ""


class Sandbox:
    """Runs programs inside walls. For any number of threads.

    Args:
        limits: of each process.
        unsandboxed: run with limits alone where no wall can be built. Only for programs that you would run yourself.

    Attributes:
        walls: "namespaces", "bubblewrap" or "none".

    Raises:
        ValueError: no wall can be built here, with the reason of each.
    """

    def __init__(self, limits: Limits | None = None, unsandboxed: bool = False):
        self.limits = limits or Limits()
        self.walls = _walls_here(unsandboxed)

    def check(self, solution: str, tests: str, name: str | None = None) -> Verdict:
        """Runs tests, a Python program, that call the solution's functions.

        Args:
            name: of the function to test; default: all that do not hide a builtin.

        Raises:
            ValueError: no tests; OSError: the processes could not be started.
        """
        require(bool(tests.strip()), "there are no tests: without any, all programs would pass")
        secret = secrets.token_hex(16)
        ours, theirs = socket.socketpair()
        with ours, theirs, contextlib.ExitStack() as if_not_all_start:
            checker = self._start("tests", {"tests": tests, "wanted": name, "secret": secret}, ours.fileno())
            if_not_all_start.callback(checker.end)
            started = [checker, self._start("functions", {"source": solution}, theirs.fileno())]
            if_not_all_start.pop_all()
        checked, ran = wait(started, self.limits.seconds)
        return _verdict(checked, ran, secret)

    def run(self, program: str, given: str = "") -> Ended:
        """Runs a program that reads `given` from standard input. Raises OSError: it could not be started."""
        (ended,) = wait([self._start("program", {"source": program, "input": given})], self.limits.seconds)
        return ended

    def check_output(self, program: str, given: str, wanted: str) -> Verdict:
        """Whether the program writes what is wanted to standard output; how words are spaced does not count."""
        ended = self.run(program, given)
        if ended.stopped:
            return Verdict(False, ended.stopped)
        if ended.status:
            return Verdict(False, "status", f"{ended.status}: {last_line(ended.output)}")
        right = ended.output.decode(errors="replace").split() == wanted.split()
        return Verdict(right, "passed" if right else "failed", last_line(ended.output))

    def _start(self, role: str, payload: dict[str, Any], channel: int | None = None) -> Process:
        settings = {
            "role": role,
            "walls": self.walls,
            "channel": channel,
            "parent": os.getpid(),
            "readable": sandbox_process.readable(),
            "seconds": self.limits.seconds,
            "memory": self.limits.memory_mb << 20,
            "processes": self.limits.processes + 2,  # with those that wait for it
            "file": self.limits.file_mb << 20,
        }
        return Process(settings, payload, self.limits.output_kb << 10)


def _verdict(checked: Ended, ran: Ended, secret: str) -> Verdict:
    """Of how the tests' process and the solution's ended."""
    stopped = checked.stopped or ran.stopped
    if stopped:
        return Verdict(False, stopped, last_line(ran.output))
    try:
        report = json.loads(checked.output)
    except ValueError:
        return Verdict(False, "ended", f"the tests' process ended with status {checked.status}")
    if report.get("secret") == secret:
        return Verdict(True, "passed")
    return Verdict(False, "failed", str(report.get("failed")))


# --- walls ------------------------------------------------------------------------------------------------


@functools.cache
def _walls_here(unsandboxed: bool) -> str:
    """The first walls that stand a trial. Raises ValueError: none do, and it is not allowed to do without."""
    reasons = []
    order = _WALLS if os.geteuid() == 0 or not shutil.which("bwrap") else _WALLS[::-1]
    for walls in order:
        try:
            _try(walls)
            return walls
        except OSError as error:
            reasons.append(f"{walls}: {error}")
    require(
        unsandboxed,
        f"programs of a model cannot be run safely here ({'; '.join(reasons)}): allow namespaces of users, install "
        "bubblewrap, or say unsandboxed to run them with limits alone",
    )
    return "none"


_TRIAL = "import os\ndef f(path):\n    return [os.path.exists(path), os.getppid() < 4]"


def _try(walls: str) -> None:
    """Raises OSError unless a program can be run, and sees neither a file of this machine nor its processes."""
    if walls == "bubblewrap" and not shutil.which("bwrap"):
        raise OSError("bwrap is not installed")
    trial = Sandbox.__new__(Sandbox)
    trial.limits, trial.walls = Limits(), walls
    with tempfile.NamedTemporaryFile() as file:
        found = trial.check(_TRIAL, f"assert f({file.name!r}) == [False, True]")
    if not found.passed:
        raise OSError(f"the walls do not hold: {found.reason} {found.detail}")

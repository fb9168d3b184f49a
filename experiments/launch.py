"""Runs a command as several processes on this machine, and starts all of them again when one dies.

    python -m experiments.launch --processes=2 --restarts=3 -- python -m experiments.train --config=configs/tiny.py

Every process gets the address of process 0, the number of processes and its own number in the environment, where
`deepseek_jax.parallel.processes.joining` finds them. Their output is shown line by line behind the number of the
process. SIGTERM and Ctrl-C are passed on to all and end the restarts. When a process fails, the others get `--grace`
seconds to notice and are then killed. None outlives this command, however it ends.

The exit status is that of the process that failed first in the last attempt (128 + the signal's number if one killed
it), but not of one that left because another did; else 0. Status 2, a mistake in the command, is not tried again.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from experiments import command_line

# What `deepseek_jax.parallel.processes.joining` looks for. Not imported from there: JAX takes seconds, the launcher
# none.
COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

_POLL = 0.05  # seconds
_LEFTOVERS = 5.0  # seconds for the rest of the output, which something that left the group may hold open
# SIGTERM when the launcher is gone, even by SIGKILL. In the new process, and not between fork and exec of this one:
# forking a process with threads may deadlock.
_END_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})  # PR_SET_PDEATHSIG of <linux/prctl.h>
os.execvp(sys.argv[1], sys.argv[1:])
"""
# What JAX writes, and then the stack, when it aborts a process because another one ended.
_LOST = "Terminating process because the JAX distributed service detected fatal errors"
_NUMBER = re.compile(r"^error: process \d+ of \d+: ")  # as `joining.failing_fast` says it
ABANDONED = 75  # of a process that left because of another one
_LEFT = (ABANDONED, 128 + signal.SIGABRT)  # JAX aborts a process whose coordinator is gone
_MOST_PROCESSES = 1024  # on one machine


def free_port() -> int:
    """Finds a TCP port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Group:
    """The processes of one attempt; each leads a process group, so that what it starts ends with it.

    Args:
        command: what each process runs.
        processes: how many there are.
    """

    def __init__(self, command: Sequence[str], processes: int):
        shared = {COORDINATOR: f"127.0.0.1:{free_port()}", PROCESSES: str(processes), "PYTHONUNBUFFERED": "1"}
        self._processes = [
            _start(command, {**os.environ, **shared, PROCESS: str(rank)}) for rank in range(processes)
        ]
        said: dict[str, int] = {}
        self._readers = [
            threading.Thread(target=_show, args=(rank, process.stdout, said), daemon=True)
            for rank, process in enumerate(self._processes)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pids(self) -> list[int]:
        """Lists the process ids by rank."""
        return [process.pid for process in self._processes]

    def send(self, signum: int) -> None:
        """Sends a signal to each process that runs, but not to what it started itself."""
        for process in self._processes:
            process.send_signal(signum)  # which does nothing to one that has ended

    def failed(self) -> tuple[int, int] | None:
        """Returns (rank, status as a shell gives it) of a process that failed, or None. It prefers one that failed by
        itself to one that left because of another."""
        statuses = [(rank, process.poll()) for rank, process in enumerate(self._processes)]
        failed = [(rank, status if status > 0 else 128 - status) for rank, status in statuses if status]
        return min(failed, key=lambda one: one[1] in _LEFT, default=None)

    def running(self) -> list[int]:
        """Returns the ranks of the processes that have not ended."""
        return [rank for rank, process in enumerate(self._processes) if process.poll() is None]

    def wait(self, seconds: float | None = None) -> None:
        """Waits until all have ended or the time is over."""
        end = None if seconds is None else time.monotonic() + seconds
        while self.running() and (end is None or time.monotonic() < end):
            time.sleep(_POLL)

    def close(self) -> None:
        """Kills what still runs, and shows the rest of the output."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for reader in self._readers:
            reader.join(_LEFTOVERS)


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    """Starts `command` in a session of its own. Raises FileNotFoundError if there is no such program."""
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
    if sys.platform == "linux":
        command = [sys.executable, "-ISc", _END_WITH_PARENT, *command]
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _show(rank: int, output: IO[str] | None, said: dict[str, int]) -> None:
    """Shows a process's output line by line, an error that several processes have once.

    said: errors so far, without the number of a process, and the rank that was first.
    """
    assert output is not None
    lost = False
    with output:
        for line in map(str.rstrip, output):
            if lost:  # the addresses of JAX's own code
                continue
            if lost := _LOST in line:
                line = "lost the other processes"
            if not line.startswith("error: ") or said.setdefault(_NUMBER.sub("", line), rank) == rank:
                sys.stdout.write(f"[{rank}] {line}\n")
                sys.stdout.flush()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, in the order in which the block receives them."""
    received: list[int] = []

    def on_signal(signum: int, _frame: Any) -> None:
        received.append(signum)

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _attempt(
    command: Sequence[str], processes: int, grace: float, received: list[int]
) -> tuple[int, int] | None:
    """Runs all processes to their end; returns (rank, status) of the one that failed first by itself, or None."""
    group = Group(command, processes)
    _say(f"processes {' '.join(map(str, group.pids))}")
    try:
        passed_on, failed = 0, None
        while failed is None and group.running():
            for signum in received[passed_on:]:
                group.send(signum)
                passed_on += 1
            group.wait(_POLL)
            failed = group.failed()
        if failed is not None:
            group.wait(grace)
            if failed[1] == ABANDONED:  # the other may have ended a moment later
                failed = group.failed()
            for rank in group.running():
                _say(f"process {rank} did not end within {grace:g} s and is killed")
        return failed or group.failed()
    finally:
        group.close()


def launch(command: Sequence[str], processes: int, restarts: int = 0, grace: float = 30.0) -> int:
    """Runs `command` as `processes` processes, at most `1 + restarts` times; returns the exit status."""
    with _signals() as received:
        for attempt in range(restarts + 1):
            failed = _attempt(command, processes, grace, received)
            if failed is None:
                return 0
            rank, status = failed
            again = attempt < restarts and not received and status != command_line.MISTAKE
            _say(f"process {rank} ended with status {status}" + (", starting all again" if again else ""))
            if not again:
                break
    return status


def _say(text: str) -> None:
    print(f"[launch] {text}", flush=True)


def main(argv: Sequence[str]) -> int:
    parser = command_line.Parser(description="Run a command as several processes on this machine.")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument(
        "--restarts", type=int, default=0, help="how often all are started again when one fails"
    )
    parser.add_argument("--grace", type=float, default=30.0, help="seconds until the others are killed")
    parser.add_argument("command", nargs="+", metavar="-- command")
    args = parser.parse_args(argv)
    if not 1 <= args.processes <= _MOST_PROCESSES or args.restarts < 0 or not 0 <= args.grace < float("inf"):
        parser.error(
            f"--processes={args.processes} must lie in [1, {_MOST_PROCESSES}], --restarts={args.restarts} and "
            f"--grace={args.grace} must be at least 0 and finite"
        )
    return launch(args.command, args.processes, args.restarts, args.grace)


if __name__ == "__main__":
    command_line.run(main)

"""Training runs of several processes on this machine, for tests: start, watch, disturb, wait; never without a limit."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deepseek_jax.training.metrics import METRICS_FILE, read_records

LIMIT = 240.0  # seconds until a test gives up, on a machine that does many other things


def devices(count: int) -> dict[str, str]:
    """Environment of a process with `count` CPU devices; its programs compile fast, as here (`tests/conftest.py`)."""
    flags = f"--xla_force_host_platform_device_count={count} --xla_cpu_multi_thread_eigen=false"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}


def until(condition: Callable[[], bool], what: str, limit: float = LIMIT) -> float:
    """Waits for it; seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit, f"{what}: not within {limit:g} s"
        time.sleep(0.02)
    return time.monotonic() - began


class Launched:
    """A command under `experiments.launch`, its output in a file. Leaves nothing behind: use as a context."""

    def __init__(self, log: Path, command: Sequence[str], options: Sequence[str], env: Mapping[str, str]):
        self._log = log
        launcher = (sys.executable, "-m", "experiments.launch", *options, "--", *command)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                launcher, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **env}
            )

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def printed(self) -> str:
        return self._log.read_text()

    def wait(self) -> int:
        """Exit status."""
        until(lambda: self.process.poll() is not None, self.printed[-2000:])
        return self.process.returncode

    def pids(self, attempt: int = 0) -> list[int]:
        """Of the ranks, in the given attempt; waits until it is under way."""
        found: list[str] = []

        def begun() -> bool:
            found[:] = re.findall(r"\[launch\] processes ([\d ]+)\n", self.printed)
            return len(found) > attempt

        until(begun, f"attempt {attempt} under way")
        return [int(pid) for pid in found[attempt].split()]


def step(folder: Path) -> int:
    """The last step that a run has recorded; 0 before the first."""
    path = folder / METRICS_FILE
    records = read_records(path) if path.exists() else []
    return max((record["step"] for record in records), default=0)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

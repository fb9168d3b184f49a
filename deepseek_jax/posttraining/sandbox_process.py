"""A process with walls around it: how it is started, read, ended."""

import contextlib
import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.posttraining.sandboxed.main import READY

_HERE = Path(__file__).parent
_PATIENCE = 5  # seconds for what was told to end
_START = "import sys; sys.path.insert(0, {!r}); from sandboxed.main import main; main()"


class Ended(NamedTuple):
    """How a process ended: its output, its exit status (128 + signal), and what ended it ("", "time" or "output")."""

    output: bytes
    status: int
    stopped: str


class Process:
    """A process with walls around it, and what it has written so far, the line that says that it is ready included."""

    def __init__(self, settings: dict[str, Any], payload: dict[str, Any], most: int):
        self._most, self._written = most + len(READY), b""
        self.stopped, self.open = "", True
        channel = settings["channel"]
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(payload).encode())
            file.seek(0)
            self._process = subprocess.Popen(
                _command(settings),
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={"PYTHONHASHSEED": "0"},
                cwd="/",
                pass_fds=() if channel is None else (channel,),
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self.output = self._process.stdout

    def read(self) -> bool:
        """Takes what was written; False at the end."""
        data = os.read(self.output.fileno(), 1 << 16)
        self._written += data
        if self._is_over:
            self.stopped = self.stopped or "output"
        self.open = bool(data)
        return self.open

    def end(self) -> None:
        """Ends it with all that it started, and waits until they have: until nobody can write any more."""
        with self._process, self.output:
            self._process.terminate()
            try:
                self._process.wait(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
            with selectors.DefaultSelector() as selector:
                selector.register(self.output, selectors.EVENT_READ)
                while self.open and not self._is_over and selector.select(_PATIENCE):
                    self.read()

    @property
    def _is_over(self) -> bool:
        return len(self._written) > self._most

    def ended(self) -> Ended:
        """Raises OSError if it never became ready."""
        ready, _, output = self._written.partition(b"\n")
        if ready + b"\n" != READY and not self.stopped:
            raise OSError(
                f"a sandboxed process did not start: {last_line(self._written) or 'it said nothing'}"
            )
        return Ended(output, self._process.returncode, self.stopped)


def wait(processes: Sequence[Process], seconds: float) -> list[Ended]:
    """Waits until the first has ended or one was stopped, then ends all. Raises OSError if one never became ready."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as ending, selectors.DefaultSelector() as selector:
        for process in processes:
            ending.callback(process.end)
            selector.register(process.output, selectors.EVENT_READ, process)
        while processes[0].open and not any(process.stopped for process in processes):
            _read(selector, processes, deadline)
    return [process.ended() for process in processes]


def _read(selector: selectors.BaseSelector, processes: Sequence[Process], deadline: float) -> None:
    """Reads what there is, or stops all at the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        for process in processes:
            process.stopped = "time"
        return
    for key, _ in selector.select(left):
        if not key.data.read():
            selector.unregister(key.fileobj)


def last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else ""


# --- the command ------------------------------------------------------------------------------------------


@functools.cache
def readable() -> tuple[str, ...]:
    """Folders that hold the interpreter's standard library and the C libraries that it loads."""
    library = Path(os.__file__).parent
    wanted = (
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/etc/ld.so.cache",
        str(library),
        f"{sys.base_prefix}/lib",
    )
    found = [path for path in dict.fromkeys(wanted) if os.path.lexists(path)]
    within = [path for path in found if any(path.startswith(f"{other}/") for other in found)]
    return tuple(path for path in found if path not in within)


def _command(settings: dict[str, Any]) -> list[str]:
    python = [
        getattr(sys, "_base_executable", sys.executable),
        "-S",
        "-s",
        "-P",
        "-c",
        _START.format(str(_HERE)),
    ]
    inside = [*python, json.dumps(settings)]
    if settings["walls"] != "bubblewrap":
        return inside
    shown = [
        word
        for path in (*readable(), python[0], str(_HERE / "sandboxed"))
        for word in ("--ro-bind", path, path)
    ]
    return [
        *(
            str(shutil.which("bwrap")),
            "--unshare-all",
            "--unshare-user",
            "--die-with-parent",
            "--new-session",
        ),
        *(
            "--cap-drop",
            "ALL",
            "--uid",
            "65534",
            "--gid",
            "65534",
            "--clearenv",
            "--setenv",
            "PYTHONHASHSEED",
            "0",
        ),
        *shown,
        *("--dev", "/dev", "--size", str(16 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--"),  # both are memory without a limit
        *inside,
    ]

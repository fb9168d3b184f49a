"""`RunLock` locks a run's folder, so that two runs do not write to it at once. It names its owner and ends with it.

`run.lock` is JSON: host, pid, since when, and what tells one process from another with the same pid. Its owner touches
it every few seconds. A lock whose owner is dead is taken over: on this host the process table says so at once; of
another host, a lock that nobody touches for `STALE_AFTER` seconds, watched from here, for clocks differ.

The first process of a run takes the lock for all of them.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

LOCK = "run.lock"
BEAT_EVERY = 5.0  # seconds between the owner's signs of life
STALE_AFTER = 30.0  # seconds without one: the owner is dead


class RunLock:
    """The lock on `folder`, held from the constructor to `release`.

    Args:
        folder: created if missing.
        beat_every, stale_after: seconds; alike for all that may want the folder.

    Raises:
        ValueError: somebody else holds it; names host, process and time. OSError: the folder cannot be written.
        Waits at most `stale_after`, and only for an owner on another host that shows no sign of life.
    """

    def __init__(self, folder: Path, beat_every: float = BEAT_EVERY, stale_after: float = STALE_AFTER):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOCK
        self._me = {**_whoami(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "token": uuid.uuid4().hex}
        while not _create(self.path, json.dumps(self._me)):
            owner = _read(self.path)
            if _is_alive(self.path, owner, stale_after):
                raise ValueError(_in_use(self.path, _read(self.path)))
            self._remove_stale(owner)
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(beat_every,), name="run lock", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Raises OSError if the lock is not ours any more: taken over, or removed, perhaps with the folder."""
        owner = _read(self.path)
        if owner is None:
            raise FileNotFoundError(
                f"{self.path} is gone: the run's folder was removed or replaced while the run went on"
            )
        if owner.get("token") != self._me["token"]:
            raise OSError(f"{_in_use(self.path, owner)}; it took this run for dead")

    def release(self) -> None:
        """Gives the folder free; does nothing the second time, or if the lock is another's by now."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(OSError):
            self.check()
            self.path.unlink()

    def _remove_stale(self, owner: dict[str, Any] | None) -> None:
        """Takes away the lock that was found dead; a new one, which came in between, is put back."""
        aside = self.path.with_name(f"{LOCK}.{self._me['token']}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(self.path, aside)
            if _read(aside) != owner:
                _create(self.path, aside.read_text(encoding="utf-8"))
            aside.unlink()

    def _beat(self, every: float) -> None:
        while not self._ended.wait(every):
            with contextlib.suppress(OSError):  # the next `check` says what is wrong
                self.check()
                os.utime(self.path)


def _create(path: Path, text: str) -> bool:
    """Creates the lock; returns False if there is one."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _in_use(path: Path, owner: dict[str, Any] | None) -> str:
    owner = owner or {}
    return (
        f"{path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')} since "
        f"{owner.get('since', '?')}: stop that run (in the same process: close its Trainer), or choose another "
        "train.out_dir"
    )


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says; {} if that is no JSON object, None if there is none."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, NotADirectoryError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


# --- who lives --------------------------------------------------------------------------------------------------


def _whoami() -> dict[str, Any]:
    """This process: `place` is where its pid means something, `started` tells it from others that had its pid."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "place": _place(),
        "started": _started(os.getpid()),
    }


def _place() -> str:
    """Host, boot and namespace of pids: containers may share a host's name, and a folder."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; "" for one that is dead, None where that cannot be asked."""
    if not os.path.isdir("/proc/self"):
        return None
    try:
        # the name, in parentheses, may hold anything
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]  # field 22 of proc_pid_stat(5); a zombie is dead


def _is_alive(path: Path, owner: dict[str, Any] | None, stale_after: float) -> bool:
    if owner is None:
        return False
    if owner.get("place") != _place() or type(owner.get("pid")) is not int:
        return _beats(path, stale_after)
    started = _started(owner["pid"])
    if started is not None:
        return bool(started) and started == owner.get("started")
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beats(path: Path, stale_after: float) -> bool:
    """Whether the lock is touched within `stale_after` seconds from now; gone counts as no."""
    first, end = _touched(path), time.monotonic() + stale_after
    while time.monotonic() < end:
        time.sleep(min(0.5, stale_after / 10))
        if (now := _touched(path)) != first:
            return now is not None
    return False


def _touched(path: Path) -> int | None:
    try:
        with open(path, "rb") as file:  # opening asks a network file system anew
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None

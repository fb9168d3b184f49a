"""The lock on a run's folder: one owner, named; the dead own nothing, on this host or on others."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from deepseek_jax.training.run_lock import LOCK, RunLock, _started, _whoami


def lock(folder, **changes):
    """Writes a lock as another process would have."""
    (folder / LOCK).write_text(
        json.dumps({**_whoami(), "since": "2025-01-02 03:04:05", "token": "t"} | changes)
    )


def take(folder):
    return RunLock(folder, beat_every=0.05, stale_after=0.4)


def test_one_at_a_time_and_the_owner_is_named(tmp_path):
    folder = tmp_path / "runs" / "new"
    owner = take(folder)
    named = rf"new is in use by process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d "
    with pytest.raises(ValueError, match=named):
        take(folder)
    owner.check()
    owner.release()
    owner.release()
    second = take(folder)
    second.release()
    assert list(folder.iterdir()) == []


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        yield living
        living.kill()


def test_a_living_process_keeps_it_and_a_dead_one_does_not(tmp_path, process):
    lock(tmp_path, pid=process.pid, started=_started(process.pid))
    with pytest.raises(ValueError, match=f"process {process.pid} on .* since 2025-01-02 03:04:05"):
        take(tmp_path)
    process.kill()
    while _started(process.pid):  # until it is a zombie, which nobody waits for yet
        pass
    take(tmp_path).release()


def test_a_process_that_got_the_pid_of_a_dead_one_is_another(tmp_path, process):
    lock(tmp_path, pid=process.pid, started="1")
    take(tmp_path).release()


@pytest.mark.parametrize("place", ["another host", None, "damaged"])
def test_elsewhere_signs_of_life_decide(tmp_path, place):
    lock(tmp_path, host="far", pid=7, place=place)
    if place == "damaged":
        (tmp_path / LOCK).write_text("{")
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(tmp_path / LOCK)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(
            ValueError, match="in use by process " + (r"\? on \?" if place == "damaged" else "7 on far")
        ):
            take(tmp_path)
    finally:
        ended.set()
        heart.join()
    take(tmp_path).release()


def test_the_owner_shows_signs_of_life(tmp_path):
    owner, before = take(tmp_path), (tmp_path / LOCK).stat().st_mtime_ns
    limit = threading.Event()
    for _ in range(100):
        limit.wait(0.02)
        if (tmp_path / LOCK).stat().st_mtime_ns != before:
            break
    else:
        pytest.fail("no sign of life within 2 s")
    owner.release()


def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path):
    lock(tmp_path, started="1")

    def attempt(_):
        try:
            return take(tmp_path)
        except ValueError:
            return None

    with ThreadPoolExecutor(8) as pool:
        [owner] = [found for found in pool.map(attempt, range(8)) if found is not None]
    owner.check()
    owner.release()


def test_an_owner_that_lost_it_notices_and_leaves_it_alone(tmp_path):
    owner = take(tmp_path)
    lock(tmp_path, host="far", pid=7)
    with pytest.raises(OSError, match=r"in use by process 7 on far since 2025.*; it took this run for dead"):
        owner.check()
    owner.release()
    assert (tmp_path / LOCK).exists()
    (tmp_path / LOCK).unlink()
    owner = take(tmp_path)
    (tmp_path / LOCK).unlink()
    with pytest.raises(OSError, match=r"run\.lock is gone: the run's folder was removed or replaced"):
        owner.check()
    owner.release()

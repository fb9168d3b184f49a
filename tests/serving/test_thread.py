"""An engine's thread always answers, also when it is asked too late or the engine fails. Its engine here is a shell."""

import queue
import threading

import pytest

from deepseek_jax.serving.request import QueueFullError, Request, Update
from deepseek_jax.serving.thread import EngineThread


class Shell:
    """An engine that says "length" to each request, refuses id "full" and fails at id "bad"."""

    idle = False

    def __init__(self):
        self.taken = []

    def close(self): ...

    @property
    def has_work(self):
        return bool(self.taken)

    def submit(self, request):
        if request.id == "full":
            raise QueueFullError("full", 2.0)
        self.taken.append(request.id)

    def step(self):
        ids, self.taken = self.taken, []
        if "bad" in ids:
            raise MemoryError("no room")
        return [Update(i, finish_reason="length") for i in ids]


def asked(thread, id):
    """What comes first of a request that waits for nothing."""
    found = queue.SimpleQueue()
    thread.submit(Request(id, [1], 1), found.put, found.put)
    return found.get(timeout=10)


def test_it_answers_whether_or_not_the_caller_waits():
    thread = EngineThread(Shell())
    assert asked(thread, "a").finish_reason == "length"
    error = asked(thread, "full")
    assert isinstance(error, QueueFullError) and error.retry_after == 2.0
    with pytest.raises(QueueFullError, match="full"):
        thread.submit(Request("full", [1], 1), print)
    assert thread.call(lambda: threading.current_thread().name) == "engine"
    thread.close()
    assert "the engine has ended: it was closed" in str(asked(thread, "late"))
    with pytest.raises(RuntimeError, match="it was closed"):
        thread.call(lambda: 3)


def test_a_failure_reaches_all_that_wait_and_all_that_come_later():
    thread = EngineThread(Shell())
    update = asked(thread, "bad")
    assert update.finish_reason == "error" and update.error == "the engine failed: MemoryError: no room"
    thread._thread.join(10)
    assert isinstance(thread.failed, MemoryError)
    assert isinstance(asked(thread, "late"), RuntimeError)


def test_a_listener_that_fails_keeps_nobody_from_hearing():
    thread, heard = EngineThread(Shell()), queue.SimpleQueue()

    def fails(update):
        raise KeyError(update.id)

    def both():
        for name, listener in (("a", fails), ("b", heard.put)):
            thread.engine.submit(Request(name, [1], 1))
            thread._listeners[name] = listener

    thread._listeners["c"] = fails  # is told at the end
    thread.call(both)
    assert "the engine failed: KeyError" in heard.get(timeout=10).error
    assert isinstance(asked(thread, "late"), RuntimeError)


def test_requests_that_race_with_its_end_are_answered():
    for _ in range(50):
        thread = EngineThread(Shell())
        found = queue.SimpleQueue()
        closing = threading.Thread(target=thread.close)
        closing.start()
        for i in range(20):
            thread.submit(Request(str(i), [1], 1), found.put, found.put)
        closing.join()
        assert all(found.get(timeout=10) is not None for _ in range(20))

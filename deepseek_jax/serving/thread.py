"""`EngineThread` runs an engine on a thread of its own, for callers of any other."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.request import Request, Update

OnUpdate = Callable[[Update], None]
OnRefused = Callable[[Exception], None]


class EngineThread:
    """Takes requests from any thread, and tells what comes of them.

    Everything that a caller asks is done between two turns, in the order in which it was asked. `on_update` is called on the
    engine's thread, once or more for each request that was taken, the last time with a finish reason; it must be quick.

    Attributes:
        failed: what ended the thread, if it did not end by `close`.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.failed: BaseException | None = None
        self._asked: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._listeners: dict[str, OnUpdate] = {}
        self._over = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_update: OnUpdate, on_refused: OnRefused | None = None) -> None:
        """Waits until the engine took the request. Raises ValueError, QueueFullError as `Engine.submit`, RuntimeError if the
        engine has ended. With `on_refused` it waits for nothing: instead of being raised, the error is given to it, on any
        thread."""

        def take() -> None:
            self.engine.submit(request)
            self._listeners[request.id] = on_update

        if on_refused is None:
            self.call(take)
        else:
            self._ask(take, lambda _: None, on_refused)

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """Asks for the end of a request, and does not wait for it."""
        self.post(lambda: self.engine.abort(request_id, reason))

    def post(self, function: Callable[[], Any]) -> None:
        """Runs a function between two turns of the engine, which fails if it raises, and does not wait for it."""
        self._asked.put(function)

    def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function between two turns of the engine and waits for what it returns, or raises what it raises."""
        done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._ask(function, lambda value: done.put((True, value)), lambda error: done.put((False, error)))
        good, value = done.get()
        if good:
            return value
        raise value

    def _ask(
        self, function: Callable[[], Any], done: Callable[[Any], None], failed: Callable[[Exception], None]
    ) -> None:
        """Has a function run between two turns. One of `done` and `failed` is called, whatever happens."""

        def run() -> None:
            try:
                if self._over:
                    raise RuntimeError(
                        f"the engine has ended: {self.failed or 'it was closed'}"
                    ) from self.failed
                value = function()
            except Exception as error:
                failed(error)
            else:
                done(value)

        self._asked.put(run)
        if self._over:
            self._answer_the_rest()

    def _answer_the_rest(self) -> None:
        """What was asked too late."""
        with contextlib.suppress(queue.Empty):
            while True:
                ask = self._asked.get(block=False)
                if ask is not None:
                    ask()

    def close(self) -> None:
        """Ends the thread after the present turn; requests that are not ended are aborted."""
        self._asked.put(None)
        self._thread.join()
        self.engine.close()

    def _run(self) -> None:
        try:
            while self._do_what_was_asked():
                self._tell(self.engine.step())
            reason, error = "abort", None
        except BaseException as failure:
            self.failed, reason = failure, "error"
            error = f"the engine failed: {type(failure).__name__}: {failure}"
        for request_id in list(self._listeners):
            with contextlib.suppress(Exception):  # of one that hears; the others hear nevertheless
                self._tell([Update(request_id, finish_reason=reason, error=error)])
        self._over = True
        self._answer_the_rest()

    def _do_what_was_asked(self) -> bool:
        """Waits for something to do; False at the end."""
        wait = self.engine.idle or not self.engine.has_work
        while True:
            try:
                ask = self._asked.get(block=wait)
            except queue.Empty:
                return True
            if ask is None:
                return False
            ask()
            wait = not self.engine.has_work

    def _tell(self, updates: list[Update]) -> None:
        for update in updates:
            listener = self._listeners.get(update.id)
            if update.finish_reason is not None:
                self._listeners.pop(update.id, None)
            if listener is not None:
                listener(update)

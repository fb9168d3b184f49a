"""An event loop on a thread of its own, whose tasks end with it."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any


class LoopThread:
    """Runs tasks. name: of the thread."""

    def __init__(self, name: str):
        self._loop, self._tasks = asyncio.new_event_loop(), set[asyncio.Task[Any]]()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Tasks that are not ended."""
        return len(self._tasks)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Has a function called on the loop's thread; nothing, if it is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """On the loop's thread: runs it as a task, which must not fail."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """Cancels all tasks, and waits for their ends."""
        asyncio.run_coroutine_threadsafe(self._cancelled(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancelled(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""Shows on standard error what the command does now, with its seconds.

On a terminal one line counts the seconds and stays when the work is done, if that took long. Elsewhere, and above a
progress bar, which has its own line, the work is named once it takes long, and again with its seconds when it is done.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

_LONG = 1.0  # seconds after which work is worth a line
_REMINDER = 30.0  # seconds between lines where none counts


class Screen:
    """Writes to `file`; to standard error, as it is when something is shown, for None."""

    def __init__(self, file: TextIO | None = None):
        self._file = file
        self.quiet = False  # True: show nothing, as all but the first of several processes
        # work within work, and what it is; the innermost is shown
        self._inside: list[tuple[threading.Event, str]] = []

    def line(self, text: str) -> None:
        """Writes a line at once, whatever is shown; any thread may call it."""
        if not self.quiet:
            file = self._file or sys.stderr
            _line(text, file, counts=file.isatty() and not tqdm._instances)

    def stopping(self, text: str) -> None:
        """As `line`, with the work that goes on meanwhile."""
        self.line(text + "".join(f" (now: {what})" for _, what in self._inside[-1:]))

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows `what` while the block runs, as a `deepseek_jax.now.Show`."""
        if self.quiet:
            yield
            return
        file, began, over = self._file or sys.stderr, time.monotonic(), threading.Event()
        counts = file.isatty() and not tqdm._instances
        inside = (over, what)
        self._inside.append(inside)
        thread = threading.Thread(
            target=_tell, args=(what, file, counts, over, lambda: self._inside[-1:] == [inside]), daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._inside.remove(inside)
            seconds = time.monotonic() - began
            if seconds >= _LONG:
                _line(f"{what}: {seconds:.0f} s", file, counts)
            elif counts:
                _write("\r\x1b[K", file)


def _tell(what: str, file: TextIO, counts: bool, over: threading.Event, shown: Callable[[], bool]) -> None:
    """Shows `what` until `over`, as long as `shown` says that it is the innermost work."""
    seconds = 0.0
    while counts:
        if shown():
            _write(f"\r\x1b[K{what} ..." + (f" {seconds:.0f} s" if seconds else ""), file)
        if over.wait(1.0):
            return
        seconds += 1.0
    if not over.wait(_LONG):
        _line(f"{what} ...", file, counts)
        while not over.wait(_REMINDER):
            seconds += _REMINDER
            if shown():
                _line(f"{what} ... {seconds:.0f} s", file, counts)


def _line(text: str, file: TextIO, counts: bool) -> None:
    """Writes a line of its own, above the progress bars."""
    if counts:
        _write(f"\r\x1b[K{text}\n", file)
    else:
        tqdm.write(text, file=file)
        file.flush()


def _write(text: str, file: TextIO) -> None:
    file.write(text)
    file.flush()


SCREEN = Screen()

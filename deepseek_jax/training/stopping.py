"""Signals stop a run: after one SIGTERM or Ctrl-C it saves and ends; a second Ctrl-C ends it at once."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

INTERRUPTED = 128 + signal.SIGINT  # exit status

_STOPPING = "stopping after this step, then saving; Ctrl-C again ends at once, without saving"
_SAID = b"\nerror: interrupted again: ended without saving; the same command goes on from the last whole checkpoint\n"


@contextlib.contextmanager
def stop_on_signals(say: Callable[[str], None] | None = None) -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set. A second Ctrl-C ends the process at once, with status 130.

    `say` hears of the first at once, in a thread of its own.

    At once, whatever any thread does or waits for: a checkpoint is given its name when it is whole, so that one being
    written leaves nothing that counts. Signals are taken from the kernel by a thread of their own, since Python's
    handlers have to wait for the main thread, which may be in a compiler or a file system for minutes.
    Main thread only; elsewhere the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ours, kernels = socket.socketpair()
    kernels.setblocking(False)
    previous_fd = signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
    previous = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    listener = threading.Thread(target=_listen, args=(ours, stop, say), name="signals", daemon=True)
    listener.start()
    try:
        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(previous_fd)
        kernels.close()  # ends the listener
        listener.join()
        ours.close()


def _listen(ours: socket.socket, stop: threading.Event, say: Callable[[str], None] | None) -> None:
    """One byte per signal, its number, until the other end is closed."""
    while number := ours.recv(1):
        if number[0] == signal.SIGINT and stop.is_set():
            with contextlib.suppress(OSError):
                os.write(2, _SAID)
            os._exit(INTERRUPTED)
        if number[0] in (signal.SIGTERM, signal.SIGINT):
            stop.set()
            if say is not None:
                # which may wait for a screen that somebody holds; the next signal must not
                threading.Thread(target=say, args=(_STOPPING,), name="say", daemon=True).start()

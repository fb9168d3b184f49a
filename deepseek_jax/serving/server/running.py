"""Runs a service: HTTP while it gets ready, and an end that loses no request that was taken."""

import asyncio
import contextlib
import functools
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp

from deepseek_jax.serving.server.gate import LOGGER

SIGNALS = (signal.SIGTERM, signal.SIGINT)
IN_BACKGROUND = "in the background"  # a thread that may be compiling when the process ends
_LATE = 5  # seconds in which answers must have gone out that were ended at the end


class Life(Protocol):
    """What is run: `service.py: Service`, or a router."""

    requests: int

    @property
    def ready(self) -> bool: ...

    def begin(self, what: Any, /) -> None: ...

    def drain(self) -> None: ...

    async def drained(self, seconds: float) -> bool: ...

    def close(self) -> None: ...


class _Server(uvicorn.Server):
    """Signals are `_Run`'s."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0: any that is free. Raises ValueError if that cannot be had."""
    with contextlib.ExitStack() as undone:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = undone.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"cannot listen at {host}:{port}: {error}; choose another port, or 0 for any that is free"
            ) from error
        undone.pop_all()
    return listener


def run(
    app: ASGIApp,
    service: Life,
    listener: socket.socket,
    load: Callable[[], Any],
    *,
    grace: float,
    on_ready: Callable[[], None],
    at_once: Callable[[int], None],
) -> None:
    """Answers until a signal comes, SIGTERM or SIGINT: then it takes no new requests, finishes those that it has, and
    returns.

    Args:
        app: the endpoints of the service.
        load: makes what is served; is called in another thread while the server says that it is not ready.
        grace: seconds that requests have to end; then they are ended with an error.
        on_ready: called when it is ready.
        at_once: called at a second signal with its number; should not return.

    Raises what `load` raises.
    """
    asyncio.run(_Run(service, load, grace, on_ready, at_once).run(app, listener))


class _Run:
    def __init__(
        self,
        service: Life,
        load: Callable[[], Any],
        grace: float,
        on_ready: Callable[[], None],
        at_once: Callable[[int], None],
    ):
        self._service, self._load, self._grace = service, load, grace
        self._on_ready, self._at_once = on_ready, at_once
        self._signals = 0
        self._error: BaseException | None = None
        self._ending: asyncio.Task[None] | None = None

    async def run(self, app: ASGIApp, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_LATE,
        )
        self._server, self._loop = _Server(config), asyncio.get_running_loop()
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._signal, number)
        threading.Thread(target=self._prepare, name=IN_BACKGROUND, daemon=True).start()
        await self._server.serve(sockets=[listener])
        if self._error is not None:
            raise self._error
        self._service.close()

    def _prepare(self) -> None:
        """In a thread of its own."""
        try:
            served = self._load()
            self._call(functools.partial(self._begin, served))
        except BaseException as error:
            self._call(functools.partial(self._fail, error))

    def _call(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function)

    def _begin(self, served: Any) -> None:
        self._service.begin(served)
        if self._service.ready:
            self._on_ready()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._server.should_exit = True

    def _signal(self, number: int) -> None:
        self._signals += 1
        name = signal.Signals(number).name
        if self._signals > 1:
            LOGGER.warning("stopping at once", extra={"fields": {"signal": name}})
            self._at_once(number)
            return
        fields = {"signal": name, "requests": self._service.requests, "grace_s": self._grace}
        LOGGER.info("stopping", extra={"fields": fields})
        self._service.drain()
        self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        in_time = await self._service.drained(self._grace)
        LOGGER.info("stopped", extra={"fields": {"all_finished": in_time}})
        self._server.should_exit = True

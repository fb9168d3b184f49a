"""A connection between a decode and a prefill server that stops where a test says, by the messages that pass."""

import asyncio
import contextlib
import struct
import threading
from collections.abc import Callable

_HEAD = struct.Struct("!BIQ")  # as `transfer/wire.py` has it: kind, bytes of the object, bytes behind it
_TAKEN, _PAGES, _DONE = 2, 3, 5
STATES = ("handshake", "queued", "transferring")


class Tap:
    """Listens at a port and passes everything on to `real()`. After `hold(state)`, the next connection gets into that state
    and no further; `reached` is set when it is there. Whatever ends on one side ends on the other."""

    def __init__(self, real: Callable[[], str | None]):
        self._real, self._state = real, None  # type: ignore[var-annotated]
        self.reached = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connected, "127.0.0.1", 0), self._loop
        ).result(5)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def hold(self, state: str) -> None:
        self.reached.clear()
        self._state = state

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _connected(self, asker: asyncio.StreamReader, to_asker: asyncio.StreamWriter) -> None:
        state, self._state = self._state, None
        real = self._real()
        writers = [to_asker]
        try:
            host, _, port = (real or ":0").rpartition(":")
            giver, to_giver = await asyncio.open_connection(host, int(port))
            writers.append(to_giver)
            ways = [
                asyncio.ensure_future(self._asks(asker, to_giver, state)),
                asyncio.ensure_future(self._gives(giver, to_asker, state)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass
        finally:
            for writer in writers:
                with contextlib.suppress(OSError):
                    writer.transport.abort()

    async def _asks(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: str | None
    ) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
            if state == "handshake":
                self.reached.set()

    async def _gives(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: str | None
    ) -> None:
        passed: list[int] = []
        while True:
            head = await reader.readexactly(_HEAD.size)
            kind, length, size = _HEAD.unpack(head)
            body = await reader.readexactly(length + size)
            if state is not None and _stops(state, kind, passed):
                self.reached.set()
                await reader.read()  # to its end
                return
            passed.append(kind)
            writer.write(head + body)
            await writer.drain()


def _stops(state: str, kind: int, passed: list[int]) -> bool:
    """Whether a message must not pass."""
    if state == "handshake":
        return True
    if state == "queued":
        return kind in (_PAGES, _DONE)
    return kind in (_PAGES, _DONE) and passed.count(_PAGES) >= 1

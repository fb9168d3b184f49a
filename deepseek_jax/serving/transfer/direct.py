"""Arrays from device to device by `jax.experimental.transfer`, where both sides have it and it answers.

It has no deadline of its own: a pull of what nobody offers, or from where nobody listens, blocks for good, and what is offered
is held until it is pulled. So each pull has a thread of its own, which is left alone when it is late; and an offer that the
other side does not pull is pulled by the server itself.
"""

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding


class Direct:
    """One side. host: address of this machine by which others reach it; device: whose arrays travel. Raises RuntimeError, or
    ImportError, where it is missing."""

    def __init__(self, host: str, device: Any):
        from jax.experimental import transfer

        here = f"[{host}]:0" if ":" in host else f"{host}:0"
        self._server = transfer.start_transfer_server(device.client, here, [here])
        self._connections: dict[str, Any] = {}

    @property
    def port(self) -> int:
        return int(self._server.address().rpartition(":")[2])

    def offer(self, array: jax.Array) -> int:
        """A number by which it can be pulled."""
        number = secrets.randbits(53)
        self._server.await_pull(number, [array])
        return number

    def take_back(self, number: int, like: jax.Array) -> None:
        """An offer that nobody will pull."""
        spec = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
        _in_thread(lambda: self._pull(self._server.address(), number, spec))

    async def pull(self, address: str, number: int, block: jax.ShapeDtypeStruct, device: Any) -> jax.Array:
        """An array of another server, on this device. Waits for as long as the caller does."""
        spec = jax.ShapeDtypeStruct(block.shape, block.dtype, sharding=SingleDeviceSharding(device))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[jax.Array] = loop.create_future()

        def tell(function: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                function(value)

        def pull() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                try:
                    array = jax.block_until_ready(self._pull(address, number, spec))
                except Exception as error:
                    loop.call_soon_threadsafe(tell, future.set_exception, OSError(str(error)))
                else:
                    loop.call_soon_threadsafe(tell, future.set_result, array)

        _in_thread(pull)
        return await future

    def _pull(self, address: str, number: int, spec: Any) -> jax.Array:
        if address not in self._connections:
            self._connections[address] = self._server.connect(address)
        return self._connections[address].pull(number, [spec])[0]  # type: ignore[no-any-return]


class Directs:
    """This machine's sides, one for each of its addresses that others use, made when they are asked for."""

    def __init__(self, device: Any):
        self._device, self._made = device, dict[str, Direct | None]()

    def at(self, host: str) -> Direct | None:
        """None where there is none."""
        if host not in self._made:
            try:
                self._made[host] = Direct(host, self._device)
            except (ImportError, RuntimeError, ValueError):
                self._made[host] = None
        return self._made[host]


def _in_thread(function: Callable[[], Any]) -> None:
    threading.Thread(target=function, name="pull", daemon=True).start()

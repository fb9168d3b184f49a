"""One process leads, the others do as it does: for work that begins at one of them, when it likes.

What runs over all devices must be launched by every process in the same order. In training all know what comes next; a server
does not: requests come to process 0. There each launch is told to the others first, over a connection of hosts: no device
takes part, so that nobody waits for what is being computed, and while there is nothing to do they wait without a limit and
without work. A connection that ends says at once that its process did.
"""

import os
import secrets
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, cast

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from deepseek_jax.parallel.processes.joining import ABANDONED

_KEY = 16  # bytes, without which nobody may connect
Say = Callable[[str], None]


class Leader:
    """Process 0's connections to the others. All processes make them at the same point of their programs.

    Args:
        say: gets the line about a process that died; this one then ends, too.
    """

    def __init__(self, say: Say):
        self._say = say
        key = secrets.token_bytes(_KEY)
        with Listener((_host(), 0), backlog=jax.process_count(), authkey=key) as listener:
            _, port = cast(tuple[str, int], listener.address)
            _told(np.frombuffer(port.to_bytes(4, "little") + key, np.uint8))
            self._others = [cast(Connection, listener.accept()) for _ in range(jax.process_count() - 1)]
        self._closing = False
        self._watch = threading.Thread(target=self._watching, name="followers", daemon=True)
        self._watch.start()

    def tell(self, message: Any) -> None:
        """To all others, which take messages in this order."""
        try:
            for other in self._others:
                other.send(message)
        except OSError:
            self._abandon()

    def close(self) -> None:
        """Lets the others go."""
        self._closing = True
        self.tell(None)
        self._watch.join()

    def _watching(self) -> None:
        """Followers say nothing: what can be read is the end."""
        left = list(self._others)
        while left:
            for other in wait(left):
                if not self._closing:
                    self._abandon()
                left.remove(cast(Connection, other))

    def _abandon(self) -> None:
        self._say("another process ended, and what is spread over all cannot go on: start all of them again")
        os._exit(ABANDONED)


class Follower:
    """Another process's connection to process 0, made at the same point of the program as the `Leader`.

    Args:
        say: gets the line if process 0 died; this one then ends, too.
    """

    def __init__(self, say: Say):
        self._say = say
        told = _told(np.zeros(4 + _KEY, np.uint8)).tobytes()
        self._leader = Client((_host(), int.from_bytes(told[:4], "little")), authkey=told[4:])

    def follow(self, do: Callable[[Any], None]) -> None:
        """Does what process 0 tells, until it lets go."""
        while (message := self._next()) is not None:
            do(message)
        self._leader.close()

    def _next(self) -> Any:
        try:
            return self._leader.recv()
        except (EOFError, OSError):
            self._say("process 0 ended, and what is spread over all cannot go on: start all of them again")
            os._exit(ABANDONED)


def _host() -> str:
    """Of process 0, as all know it since they met there."""
    met = global_state.coordinator_address
    assert met is not None, "joining.start comes first"
    return socket.gethostbyname(met.rpartition(":")[0].strip("[]"))


def _told(x: np.ndarray) -> np.ndarray:
    """Process 0's array, on all."""
    return np.asarray(multihost_utils.broadcast_one_to_all(x))

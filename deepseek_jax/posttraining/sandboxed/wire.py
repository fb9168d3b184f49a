"""Values between a solution's process and that of its tests: plain data as JSON, one message a line.

A value is taken apart by its base type and built anew: what arrives is a plain int, never an object with an `__eq__` of
its own. Nothing that arrives is run.
"""

import itertools
import json
import os
from collections.abc import Iterable
from typing import Any

MAX_MESSAGE = 1 << 20  # bytes
_MAX_ITEMS = 100_000  # of an iterator
_LISTS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def pack(value: Any) -> Any:
    """The value as JSON. Raises TypeError for what is no plain data, nor an iterator over it."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return ["int", hex(int.__index__(value))]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, str):
        return ["str", str.__str__(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    for name, kind in _LISTS.items():
        if isinstance(value, kind):
            return [name, [pack(item) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[pack(key), pack(item)] for key, item in dict.items(value)]]
    if isinstance(value, Iterable):
        return ["list", [pack(item) for item in itertools.islice(value, _MAX_ITEMS)]]
    raise TypeError(f"{type(value).__name__} is no plain data")


def unpack(packed: Any) -> Any:
    """The value that `pack` took apart. Raises ValueError, TypeError or RecursionError for anything else."""
    if packed is None or packed is True or packed is False:
        return packed
    kind, *rest = packed
    if kind == "int":
        return int(rest[0], 16)
    if kind == "float":
        return float.fromhex(rest[0])
    if kind == "complex":
        return complex(*map(float.fromhex, rest))
    if kind == "str":
        return str(rest[0])
    if kind == "bytes":
        return bytes.fromhex(rest[0])
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in rest[0]}
    return _LISTS[kind](unpack(item) for item in rest[0])


class Channel:
    """One end of a socket: messages, each a JSON value of at most `MAX_MESSAGE` bytes."""

    def __init__(self, fd: int):
        self._fd, self._rest = fd, b""

    def send(self, message: Any) -> None:
        """Raises ValueError for a message that is too long, OSError if nobody listens."""
        data = json.dumps(message).encode() + b"\n"
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(data)} bytes is longer than {MAX_MESSAGE}")
        while data:
            data = data[os.write(self._fd, data) :]

    def receive(self) -> Any:
        """Raises EOFError at the end, ValueError for what is no message."""
        while b"\n" not in self._rest:
            if len(self._rest) > MAX_MESSAGE:
                raise ValueError("a message is too long")
            piece = os.read(self._fd, 1 << 16)
            if not piece:
                raise EOFError("the other process has ended")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

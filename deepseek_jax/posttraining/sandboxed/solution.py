"""Runs a model's program: as a program that reads and writes, or as functions that the tests call from their process.

The tests are not here, nor what they expect: a program that reads its own process, replaces builtins, compares with an
`__eq__` of its own or ends with status 0 gains nothing.
"""

import os
import sys
import types
from typing import Any, NoReturn

from .wire import Channel, pack, unpack


def run_program(source: str) -> int:
    """Runs the program as `__main__`; its output and the status that is returned are its result. What it, or the interpreter,
    writes to standard error is no part of them; an error that ends it is its last line."""
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        exec(compile(source, "solution.py", "exec"), space)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


def serve(source: str, fd: int) -> None:
    """Answers calls on the channel: first the names that the program defines, then a reply to each request."""
    module = sys.modules["solution"] = types.ModuleType("solution")  # where dataclasses look for names
    space, channel = vars(module), Channel(fd)
    answer: Any = _Server(space)
    try:
        exec(compile(source, "solution.py", "exec"), space)
        classes = {name: isinstance(value, type) for name, value in space.items() if callable(value)}
        channel.send({"names": classes})
    except BaseException as error:
        channel.send(_raised(error))
        return
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        try:
            reply = {"value": answer(request)}
        except BaseException as error:
            reply = _raised(error)
        try:
            channel.send(reply)
        except ValueError as error:  # too long
            channel.send(_raised(error))


class _Server:
    """Keeps the objects that the tests made of the program's classes, by number."""

    def __init__(self, space: dict[str, Any]):
        self._space, self._objects = space, []  # type: ignore[var-annotated]

    def __call__(self, request: dict[str, Any]) -> Any:
        args = [unpack(x) for x in request.get("args", ())]
        kwargs = {key: unpack(x) for key, x in request.get("kwargs", {}).items()}
        if "name" in request:
            return pack(self._space[request["name"]](*args, **kwargs))
        if "make" in request:
            self._objects.append(self._space[request["make"]](*args, **kwargs))
            return len(self._objects) - 1
        found = getattr(self._objects[request["object"]], request["attribute"])
        if "args" in request:
            return pack(found(*args, **kwargs))
        return ["method"] if callable(found) else pack(found)


def _raised(error: BaseException) -> dict[str, Any]:
    """The error's nearest builtin class and its text."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    return {"raised": kinds[0] if kinds else "Exception", "text": text}


def end(status: int) -> NoReturn:
    """Ends the process when what was written is out; 1 if that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            os._exit(1)
    os._exit(status & 255)

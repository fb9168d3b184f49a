"""Runs the tests, in another process than the solution's, whose functions it calls over a channel.

At their end, and only then, it reports the secret that it was given: a test that ends the process early proves nothing.
"""

import builtins
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from .wire import Channel, pack, unpack


class SolutionError(Exception):
    """The solution's process ended, or said what is no answer."""


class _Calls:
    """Asks the solution's process.

    Attributes:
        asked: whether the tests have called anything.
    """

    def __init__(self, fd: int):
        self._channel, self.asked = Channel(fd), False

    def names(self) -> dict[str, bool]:
        """Names that the solution defines -> whether it is a class."""
        return dict(self._reply("names"))

    def ask(self, args: Any = None, kwargs: Any = None, **request: Any) -> Any:
        """The packed value. Raises what the solution raised, if it is an `Exception`."""
        self.asked = True
        if args is not None:
            request |= {
                "args": [pack(x) for x in args],
                "kwargs": {key: pack(x) for key, x in kwargs.items()},
            }
        try:
            self._channel.send(request)
        except OSError:
            raise SolutionError("the solution's process has ended") from None
        return self._reply("value")

    def _reply(self, wanted: str) -> Any:
        try:
            reply = self._channel.receive()
            raised = reply.get("raised")
            if raised is None:
                return reply[wanted]
            kind, text = getattr(builtins, raised, Exception), str(reply.get("text"))
        except EOFError:
            raise SolutionError("the solution's process has ended") from None
        except Exception as error:
            raise SolutionError(f"the solution's process said what is no answer: {error!r}") from None
        if not (isinstance(kind, type) and issubclass(kind, Exception)):  # SystemExit would end the tests
            raise SolutionError(f"the solution raised {raised}: {text}")
        raise _made(kind, text)


def _made(kind: type[Exception], text: str) -> Exception:
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError takes five arguments
        return SolutionError(f"the solution raised {kind.__name__}: {text}")


class _Object:
    """An object of one of the solution's classes: its methods can be called. It equals itself alone."""

    def __init__(self, calls: _Calls, number: int):
        self.__dict__["_calls"], self.__dict__["_number"] = calls, number

    def __getattr__(self, name: str) -> Any:
        calls, number = self._calls, self._number
        found = calls.ask(object=number, attribute=name)
        if found == ["method"]:
            return lambda *args, **kwargs: _value(calls.ask(args, kwargs, object=number, attribute=name))
        return _value(found)


def _value(packed: Any) -> Any:
    try:
        return unpack(packed)
    except Exception as error:
        raise SolutionError(f"the solution's process said what is no value: {error!r}") from None


def _function(calls: _Calls, name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: _value(calls.ask(args, kwargs, name=name))


def _class(calls: _Calls, name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: _Object(calls, int(calls.ask(args, kwargs, make=name)))


def _stand_ins(calls: _Calls, wanted: str | None) -> dict[str, Any]:
    """What the tests call: of each name that the solution defines, or of the wanted one alone.

    No name hides a builtin, unless it is the wanted one: a solution's `abs` or `all` would judge itself. Only what is
    written as a class, with a capital, gives objects: other results are plain data, whatever the solution makes of it.
    """
    found = {}
    for name, is_class in calls.names().items():
        hides = hasattr(builtins, name) or name.startswith("_")
        if name == wanted or (wanted is None and not hides):
            found[name] = (_class if is_class and name[0].isupper() else _function)(calls, name)
    return found


def check(tests: str, fd: int, wanted: str | None) -> str:
    """Runs the tests. Returns "" if they pass, else what failed: tests that call nothing would pass whatever the solution is."""
    calls = _Calls(fd)
    try:
        space = {"__name__": "tests", "__builtins__": builtins, **_stand_ins(calls, wanted)}
        exec(compile(tests, "tests.py", "exec"), space)
    except BaseException as error:
        return _told(error)
    return "" if calls.asked else "the tests call nothing of the solution: let them end with such a call"


def _told(error: BaseException) -> str:
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests.py"
    ]
    where = f"line {lines[-1]} of the tests: " if lines else ""
    return f"{where}{type(error).__name__}: {error}".removesuffix(": ")[:500]


def silence() -> int:
    """Sends what the tests print to nowhere; returns a descriptor of the former standard output."""
    sys.stdout.flush()
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return report

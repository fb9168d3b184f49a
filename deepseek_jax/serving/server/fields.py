"""The fields of a request's JSON object, read one by one; what is wrong is answered 400 with the field and its value."""

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.checks import plain, shown
from deepseek_jax.serving.server.errors import bad

NEAR = 0.8  # likeness (difflib's ratio) from which on one name is taken for a slip of another


class Fields:
    """An object of a request. A field that is null counts as missing; what nobody reads is left over (`leftover.py`).

    Args:
        path: of the object in the request, in front of the fields' names in errors: "stream_options.".

    Attributes:
        path: the same.
        read: names that were looked for; sections: objects in it that were.
    """

    def __init__(self, values: Mapping[str, Any], path: str = ""):
        self.values, self.path = values, path
        self.read: set[str] = set()
        self.sections: list[Fields] = []

    def get(self, name: str) -> Any:
        self.read.add(name)
        return self.values.get(name)

    def wrong(self, name: str, words: str) -> Exception:
        """What to raise: `words` say what the field must be."""
        return bad(f"{self.path}{name}={shown(self.get(name))} must be {words}", f"{self.path}{name}")

    def check(self, ok: bool, name: str, words: str) -> None:
        if not ok:
            raise self.wrong(name, words)

    def needed(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            near = difflib.get_close_matches(name, self.values.keys() - self.read, 1, NEAR)
            hint = f": there is {plain(near[0])!s}, which is no field" if near else ""
            raise bad(f"{self.path}{name} is missing{hint}", f"{self.path}{name}")
        return value

    def number(self, name: str, default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
        value = self.get(name)
        if value is None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good = number and low <= value <= high and abs(value) <= sys.float_info.max
        self.check(good, name, f"a number{_between(low, high)}")
        return float(value)

    def integer(self, name: str, default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
        value = self.get(name)
        if value is None:
            return default
        whole = value.is_integer() if isinstance(value, float) else is_id(value)
        self.check(whole and low <= value <= high, name, f"an integer{_between(low, high)}")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        self.check(value is None or isinstance(value, bool), name, "true or false")
        return default if value is None else value

    def text(self, name: str, default: Any = None) -> Any:
        value = self.get(name)
        self.check(value is None or isinstance(value, str), name, "a string")
        return default if value is None else value

    def texts(self, name: str, at_most: int) -> tuple[str, ...]:
        """A string, or a list of them; none may be empty."""
        value = self.get(name)
        many = [] if value is None else [value] if isinstance(value, str) else value
        good = isinstance(many, list) and len(many) <= at_most and all(isinstance(x, str) and x for x in many)
        self.check(good, name, f"a string, or a list of at most {at_most}, none of them empty")
        return tuple(many)

    def ids(self, name: str, at_most: float = math.inf) -> tuple[int, ...]:
        value = self.get(name)
        good = value is None or (isinstance(value, list) and all(is_id(x) and x >= 0 for x in value))
        self.check(good, name, "a list of token ids")
        self.check(
            value is None or len(value) <= at_most, name, f"a list of at most {_plain(at_most)} token ids"
        )
        return () if value is None else tuple(value)

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.get(name)
        self.check(value is None or isinstance(value, dict), name, "an object")
        return {} if value is None else value

    def objects(self, name: str) -> list[dict[str, Any]]:
        value = self.get(name)
        good = value is None or (isinstance(value, list) and all(isinstance(x, dict) for x in value))
        self.check(good, name, "a list of objects")
        return [] if value is None else value

    def section(self, name: str) -> "Fields":
        section = Fields(self.mapping(name), f"{self.path}{name}.")
        self.sections.append(section)
        return section


def is_id(value: Any) -> bool:
    return type(value) is int


def is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_id, value))


def _between(low: float, high: float) -> str:
    if low == -math.inf and high == math.inf:
        return ""
    if high == math.inf:
        return f" >= {_plain(low)}"
    return f" from {_plain(low)} to {_plain(high)}"


def _plain(number: float) -> str:
    """As it would be typed: 2147483647, not 2.14748e+09."""
    return str(int(number)) if math.isfinite(number) and number == int(number) else repr(number)

"""Checks of values, with errors of one line; `build` makes a dataclass from a mapping and checks it."""

import contextlib
import dataclasses
import difflib
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_LONGEST = 120  # characters of a value that an error repeats


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@contextlib.contextmanager
def named(before: str, after: str = "") -> Iterator[None]:
    """Puts `before` and `after` around the message of a ValueError that the block raises."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{before}{error}{after}") from error


def shown(value: Any) -> str:
    """A value for an error message: on one line, and not longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # an integer with too many digits to be written
        text = f"<{type(value).__name__} of {int(value).bit_length()} bits>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def plain(name: str) -> str:
    """A name for an error message: as it is, unless it would break the line."""
    return name if name.isprintable() and len(name) <= 2 * _LONGEST else shown(name)


def is_integer(value: Any) -> bool:
    """Whether it counts as one: Python's, NumPy's or JAX's."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def path_of(value: Any, name: str) -> Path:
    """`value` as a path, "~" expanded. Raises ValueError, with its `name`, for what is no path."""
    require(isinstance(value, str | os.PathLike), f"{name}={shown(value)} should be a path")
    return Path(os.path.expanduser(value))


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={shown(value)} is not one of {list(choices)}{_hint(value, choices)}")


def _hint(value: Any, choices: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(value)[:_LONGEST], choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def ranges(path: str, config: Any, names: str, low: float, high: float) -> None:
    """Raises ValueError unless the fields `names` of the section `path` are numbers in [low, high].

    names: one word per field. A field that is declared as int must be an integer; all that are declared as bool, True or
    False.
    """
    annotations = {field.name: field.type for field in dataclasses.fields(config)}
    for name in (name for name, declared in annotations.items() if declared in (bool, "bool")):
        value = getattr(config, name)
        require(isinstance(value, bool), f"{path}.{name}={shown(value)} must be True or False".lstrip("."))
    for name in names.split():
        value, whole = getattr(config, name), int in options_of(annotations[name])
        kind, words = (numbers.Integral, "an integer") if whole else (numbers.Real, "a finite number")
        said = f"{path}.{name}".lstrip(".") + f"={shown(value)}"
        number = isinstance(value, kind) and not isinstance(value, bool) and value == value  # not NaN
        require(number, f"{said} must be {words}")
        require(value >= low, f"{said} must be {'positive' if whole and low == 1 else f'>= {low}'}")
        require(value <= high, f"{said} must be <= {high}")


# --- dataclasses from mappings ----------------------------------------------------------------------------


def build(cls: Any, values: Mapping[str, Any], path: str = "") -> Any:
    """Dataclass `cls` from a mapping, `path` in front of its keys in errors.

    Raises ValueError: unknown keys, with the nearest valid one; wrong types; what `cls` itself refuses.
    """
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        _check_key(cls, key, path)
        nested = section_of(hints[key])
        if nested is not None and isinstance(value, Mapping):
            value = build(nested, value, f"{path}{key}.")
        elif typing.get_origin(hints[key]) is tuple:
            value = _tuple(f"{path}{key}", value, typing.get_args(hints[key])[0])
        else:
            _check_type(f"{path}{key}", value, hints[key])
        kwargs[key] = value
    return cls(**kwargs)


def _tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    """A tuple of strings, integers or numbers, or JSON's list of them, as a tuple."""
    kinds, words = {str: ((str,), "strings"), int: ((int,), "integers"), float: ((int, float), "numbers")}[
        kind
    ]
    ok = isinstance(value, tuple | list) and all(type(entry) in kinds for entry in value)
    require(ok, f"config key {name}={shown(value)} should be a tuple of {words}")
    return tuple(map(kind, value))


def _check_key(cls: Any, key: Any, path: str) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    if key not in names:
        close = difflib.get_close_matches(str(key)[:_LONGEST], names, n=1)
        hint = f"did you mean {path}{close[0]!s}?" if close else f"valid keys: {', '.join(names)}"
        raise ValueError(f"unknown config key {path}{plain(str(key))}; {hint}")


def type_of(cls: Any, key: str) -> Any:
    """The annotation of a dotted key of nested dataclasses. Raises ValueError for an unknown one, as `build`."""
    annotation, path = cls, ""
    for name in key.split("."):
        section = section_of(annotation)
        if section is None:
            raise ValueError(f"unknown config key {path}{plain(name)}; {path[:-1]} has no keys of its own")
        _check_key(section, name, path)
        annotation, path = typing.get_type_hints(section)[name], f"{path}{name}."
    return annotation


def section_of(annotation: Any) -> Any:
    """The dataclass in an annotation such as `YarnConfig | None`, or None."""
    return next((o for o in options_of(annotation) if dataclasses.is_dataclass(o)), None)


def options_of(annotation: Any) -> tuple[Any, ...]:
    """The types in an annotation such as `YarnConfig | None`."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    options = options_of(annotation)
    if float in options and isinstance(value, int | float) and not isinstance(value, bool):
        finite = math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 1023
        require(finite, f"config key {name}={shown(value)} should be a finite number")
        return
    if any(isinstance(value, o) and not (o is int and isinstance(value, bool)) for o in options):
        return
    kinds = " or ".join("None" if o is types.NoneType else o.__name__ for o in options)
    raise ValueError(f"config key {name}={shown(value)} should be {kinds}, not {type(value).__name__}")


def names_that_differ(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Names whose values differ between two mappings, or that only one has, in order."""
    return [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]


def listed(items: Sequence[str], at_most: int) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - at_most} more" if len(items) > at_most else ""
    return "; ".join(items[:at_most]) + more

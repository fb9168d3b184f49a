"""Seeded damage to a JSON value, a JSON file, any file and a command line. Each function says in words what it did."""

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

Case = Callable[[random.Random], tuple[str, Callable[[], str | None]]]
"""Damages something; (what was done, what reads it and says what is not right, or None)."""

# Values that a field does not have, but a hand, a program or a disk may have put there.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 7, 10**9, 1 << 63, 10**400, 1.5, 0.0, -0.5, 1e308),
    *(math.nan, math.inf, "", "x", "1", "null", "\n", "a\0b", "\ud800", "../../x", "x" * 1_000_000),
    *([], {}, [[]], [1, 2, 3], {"a": 1}, [None] * 1000),
)
_DEEP = 100_000
_ODD_TEXTS = (
    *("", "-1", "0", "1e999", "nan", "inf", "None", "True", "[]", "{}", "'", '"', "1,2", "=", "a=b"),
    *("\udcff", "9" * 5000, "x" * 100_000, "/", "/proc/x/y", ".", "\n", "--", "1.5", "0x10", "٣", " "),
)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_value(root: Any, rng: random.Random) -> str:
    """Changes one place somewhere below a dict or list."""
    container, key, name = _place(root, rng)
    kind = rng.choice(("odd", "odd", "odd", "delete", "rename", "add", "swap", "nudge", "deep"))
    if kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[f"{key[:-1]}"] = container.pop(key)
    elif kind == "add" and isinstance(container, dict):
        container[rng.choice(("new", "", "a.b", "\n", "_x"))] = rng.choice(ODD)
    elif kind == "swap":
        other = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        container[key], container[other] = container[other], container[key]
    elif kind == "nudge" and isinstance(container[key], int | float):
        x = container[key]
        container[key] = rng.choice((x + 1, x * 2, -x, str(x)))
    elif kind == "deep":
        container[key] = nested(rng.choice((3, 40, 200)))
    else:
        container[key] = rng.choice(ODD)
    return f"{kind} {name}"


def _place(root: Any, rng: random.Random) -> tuple[Any, Any, str]:
    """Picks (container, key, dotted name) of something below `root`; near places are likelier."""
    container, path = root, ""
    while True:
        key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
        inner = container[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            return container, key, f"{path}{key}"
        container, path = inner, f"{path}{key}."


def mutate_json(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Changes one value of a JSON file or, once in four times, some of its bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(raw, rng)
    value = json.loads(raw)
    what = mutate_value(value, rng)
    return json.dumps(value).encode(), what


def mutate_bytes(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = rng.randrange(len(raw)) if raw else 0
    kind = rng.choice(("flip", "flip", "cut", "insert", "empty", "append", "deep", "twice", "nul"))
    changed = {
        "flip": lambda: raw[:at] + bytes([(raw[at] if raw else 0) ^ 1 << rng.randrange(8)]) + raw[at + 1 :],
        "cut": lambda: raw[:at],
        "insert": lambda: raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:],
        "empty": lambda: b"",
        "append": lambda: raw + rng.choice((b"\n", b"}", b"\0" * 8, rng.randbytes(5))),
        "deep": lambda: raw[:at] + b"[" * _DEEP + raw[at:],
        "twice": lambda: raw[:1] + raw[1 : raw.find(b",") + 1] + raw[1:],
        "nul": lambda: raw[:at] + b"\0" * min(16, len(raw) - at) + raw[at + 16 :],
    }[kind]()
    return changed, f"{kind} at byte {at}"


def mutate_arguments(arguments: Sequence[str], rng: random.Random) -> tuple[list[str], str]:
    """Changes one or two arguments of a command line."""
    changed, said = list(arguments), []
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(changed)) if changed else 0
        kind = rng.choice(("value", "value", "value", "name", "drop", "twice", "add"))
        name, equals, _ = (changed[at] if changed else "").partition("=")
        if kind == "value" and equals:
            changed[at] = f"{name}={rng.choice(_ODD_TEXTS)}"
        elif kind == "name" and len(name) > 3:
            cut = rng.randrange(2, len(name))
            changed[at] = changed[at][:cut] + changed[at][cut + 1 :]
        elif kind == "drop" and changed:
            del changed[at]
        elif kind == "twice" and changed:
            changed.append(changed[at])
        else:
            changed.insert(at, rng.choice(("extra", "--unknown", "--unknown=1", "-x", *_ODD_TEXTS)))
        said.append(kind)
    return changed, " and ".join(said)

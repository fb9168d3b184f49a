"""JSON files as the library reads them: bounded in size and depth, finite numbers, no key twice.

Python's reader takes NaN, keeps the last of two equal keys and follows any nesting until the stack ends. Whatever is
wrong is a ValueError of one line that names the file and, inside it, the field.
"""

import json
import math
from pathlib import Path
from typing import Any

from deepseek_jax.checks import plain, require, shown

MAX_BYTES = 32 << 20  # the index of DeepSeek-V3 has 9 MB
MAX_DEPTH = 32
# Lists and objects, which take more memory than their bytes; a whole DeepSeek-V3 has 300,000.
MAX_CONTAINERS = 1 << 21


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError: missing, no file, too large, or as `parse_object`."""
    require(path.exists(), f"{path} is missing")
    require(path.is_file(), f"{path} is not a file")
    size = path.stat().st_size
    require(size <= max_bytes, f"{path} has {size} bytes; at most {max_bytes} are read")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return parse_object(raw, str(path))


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes; `where` names them in errors.

    Raises ValueError: not UTF-8 JSON, too many lists and objects, not an object, a key twice, nested deeper than
    `MAX_DEPTH`, a number that is not finite, a string that is not Unicode text.
    """
    containers = raw.count(b"[") + raw.count(b"{")
    if containers > MAX_CONTAINERS:
        raise ValueError(f"{where} holds {containers} lists and objects; at most {MAX_CONTAINERS} are read")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    require(isinstance(value, dict), f"{where} does not hold a JSON object")
    _check(value, where)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shown(key)} stands there twice")
        found[key] = value
    return found


def _check(value: dict[str, Any], where: str) -> None:
    """Level by level instead of by recursion, so that no nesting ends the stack."""
    level: list[tuple[str, Any]] = [("", value)]
    for _ in range(MAX_DEPTH):
        below = []
        for path, item in level:
            for key, x in item.items() if isinstance(item, dict) else enumerate(item):
                wrong = _wrong(key) or _wrong(x)
                if wrong:
                    raise ValueError(f"{where}: {plain(f'{path}{key}')}={shown(x)} is {wrong}")
                if isinstance(x, dict | list) and x:
                    below.append((f"{path}{key}.", x))
        level = below
    if level:
        raise ValueError(
            f"{where} is not valid JSON: {plain(level[0][0][:-1])} is nested deeper than {MAX_DEPTH}"
        )


def _wrong(x: Any) -> str:
    if isinstance(x, float) and not math.isfinite(x):
        return "not a finite number"
    # Lone surrogates, which JSON can spell and no file or terminal can hold.
    if isinstance(x, str) and not x.isascii() and any("\ud800" <= c <= "\udfff" for c in x):
        return "not Unicode text"
    return ""

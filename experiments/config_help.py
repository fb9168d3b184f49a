"""Lists every key of a config with its value and its documentation, which stands beside it in the dataclass.

A field is documented by the comments on its lines, else by those right above it (`# ---` begins a group, no
documentation).
"""

import ast
import dataclasses
import functools
import inspect
import io
import shutil
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

from deepseek_jax.checks import section_of, type_of

_COLUMN = 42  # where the documentation begins


@functools.cache
def docs(cls: Any) -> dict[str, str]:
    """Maps each field of a dataclass, inherited ones too, to its documentation, "" if it has none."""
    bases = (base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base))
    return {name: doc for base in bases for name, doc in _own_docs(base).items()}


def _own_docs(cls: Any) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    alone = {n for n, line in enumerate(source.splitlines(), 1) if line.strip().startswith("#")}
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = [n for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in comments]
            lines = lines or _above(node.lineno, alone, comments)
            found[node.target.id] = " ".join(comments[n] for n in lines)
    return found


def _above(line: int, alone: set[int], comments: dict[int, str]) -> list[int]:
    """Returns the lines of the comment that ends right above `line`."""
    first = line
    while first - 1 in alone and not comments[first - 1].startswith("---"):
        first -= 1
    return list(range(first, line))


def fields(value: Any, path: str = "", whole: Any = None) -> Iterator[tuple[str, Any, str]]:
    """Yields (key, value, documentation) of every key of a config, also of a section that is None."""
    cls: Any = type(value)
    whole = whole or cls
    for field in dataclasses.fields(cls):
        here, key = getattr(value, field.name), f"{path}{field.name}"
        section = section_of(type_of(whole, key))
        if dataclasses.is_dataclass(here):
            yield from fields(here, f"{key}.", whole)
            continue
        yield key, here, docs(cls)[field.name]
        if section is not None:
            yield from ((f"{key}.{name}", "-", doc) for name, doc in docs(section).items())


def listing(cfg: Any) -> str:
    """Returns a line KEY = VALUE for each key."""
    return "".join(f"{key} = {value}\n" for key, value, _ in fields(cfg) if value != "-")


def keys(cfg: Any, file: str) -> str:
    """Returns the keys, values and documentation that `--help` shows."""
    head = f"\nkeys of the config (--config.KEY=VALUE), as {file} and this command line set them:\n"
    return head + "".join(_entry(f"  {key} = {value}", doc) for key, value, doc in fields(cfg))


def _entry(setting: str, doc: str) -> str:
    width = max(40, min(120, shutil.get_terminal_size((120, 24)).columns) - _COLUMN)
    lines = textwrap.wrap(doc, width, break_on_hyphens=False) or [""]
    if len(setting) >= _COLUMN:
        lines.insert(0, "")
    setting = setting.ljust(_COLUMN) if lines[0] else setting
    rest = "".join(f"{'':{_COLUMN}}{line}\n" for line in lines[1:])
    return f"{setting}{lines[0]}\n{rest}"

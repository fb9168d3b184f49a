"""An inventory lists a folder's files with size and SHA-256, so that a reader finds lost and changed files.

`files.json` is {"files": {path: [bytes, SHA-256]}, "sha256": that of the table}. Several processes may each digest what
they have written (`write_part`); whoever finishes the folder adds the rest (`write`). A reader may divide the digests
over processes, too (`first_damaged`).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.json_files import read_object

FILES = "files.json"
_MAX_BYTES = 1 << 30  # size of the list: some 150 bytes per file
_THREADS = min(8, os.cpu_count() or 1)  # hashing and reading release the interpreter's lock


class File(NamedTuple):
    """Size and digest of a file when it was written; `sha256` is None in a list of sizes alone."""

    size: int
    sha256: str | None


def write_part(root: Path, part: str, folder: Path) -> None:
    """Digests the files below `folder`, which lies in `root`, for `write` to take over."""
    (root / f"files.{part}.json").write_text(json.dumps(_digested(root, _files(folder))))


def write(root: Path, folders: Iterable[str]) -> None:
    """Writes the list of all files below the given folders of `root`. Call it when they are in place."""
    parts = sorted(root.glob("files.*.json"))
    known: dict[str, File] = {}
    for part in parts:
        known |= {name: File(*entry) for name, entry in json.loads(part.read_text()).items()}
    present = [file for folder in folders for file in _files(root / folder)]
    rest = [file for file in present if file.relative_to(root).as_posix() not in known]
    names = {file.relative_to(root).as_posix() for file in present}
    table = {name: file for name, file in known.items() if name in names} | _digested(root, rest)
    with open(root / FILES, "w", encoding="utf-8") as out:
        json.dump({"files": table, "sha256": _of_table(table)}, out)
        out.flush()
        os.fsync(out.fileno())
    for part in parts:
        part.unlink()


def read(root: Path) -> dict[str, File]:
    """The list that `write` left in `root`. Raises ValueError if it is damaged or not there."""
    listed = read_object(root / FILES, _MAX_BYTES)
    if listed and all(type(size) is int for size in listed.values()):
        return {name: File(size, None) for name, size in listed.items()}  # before there were digests
    table = listed.get("files")
    if not isinstance(table, dict) or listed.get("sha256") != _of_table(table):
        raise ValueError(f"{root / FILES} has changed since it was written")
    return {name: File(*entry) for name, entry in table.items()}


def first_damaged(root: Path, files: Mapping[str, File], part: int = 0, parts: int = 1) -> int:
    """Returns the index, in the order of `files`, of the first file that has changed; `len(files)` if none has.

    Sizes are compared of all files, contents of those that fall to part `part` of `parts`.
    """
    items = list(enumerate(files.items()))
    wrong = [i for i, (name, file) in items if _size(root / name) != file.size]
    mine = [(i, name, file) for i, (name, file) in items if file.sha256 and i % parts == part]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: _digest(root / item[1]), mine)
        wrong += [item[0] for item, digest in zip(mine, found, strict=True) if digest != item[2].sha256]
    return min(wrong, default=len(files))


def describe_damage(root: Path, files: Mapping[str, File], index: int) -> str:
    """Says in words how the file that `first_damaged` found differs."""
    name, file = list(files.items())[index]
    if (size := _size(root / name)) != file.size:
        return f"{name} has {size} of {file.size} bytes"
    return f"{name} has other contents than when it was written (SHA-256)"


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _digest(file: Path) -> str:
    """ "" for a file that is not there."""
    if not file.is_file():
        return ""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digested(root: Path, files: list[Path]) -> dict[str, File]:
    names = [file.relative_to(root).as_posix() for file in files]
    with ThreadPoolExecutor(_THREADS) as pool:
        return {
            name: File(file.stat().st_size, digest)
            for name, file, digest in zip(names, files, pool.map(_digest, files), strict=True)
        }


def _of_table(table: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()

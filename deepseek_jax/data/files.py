"""Finds the files of a corpus: the interpreter's own sources, a glob, a folder or one file.

Real folders contain broken links, links to files that are listed already, folders that contain themselves, and
things that are no files. The report names each; no file is read twice, and no fault stops the reading of others.
"""

import fnmatch
import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.checks import require
from deepseek_jax.data.report import CorpusReport

STDLIB = "stdlib"
COMPRESSED = (".gz", ".zst")
SHARDS = (".jsonl", ".ndjson", ".parquet")

# Installed packages are not the standard library; tests would double its size; encodings and pydoc_data are
# generated tables and help texts, each a large and unlike share of whichever split it falls into.
_LEFT_OUT_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data")
)


class SourceFile(NamedTuple):
    """A file of a corpus. If path, size and time are the same, its content is taken as unchanged."""

    path: str
    size: int
    mtime_ns: int


def find_files(source: str, report: CorpusReport, left_out: Iterable[SourceFile] = ()) -> list[SourceFile]:
    """The files of "stdlib", a glob, a folder or one file, sorted by path, each once, less those of `left_out`.

    Hidden files are left out, as globs do. What matches but is no file, or the same file by another name, goes to
    `report`.

    Raises:
        ValueError: no file matches.
    """
    refused = {_identity(os.stat(file.path)) for file in left_out}
    files, seen = [], set()
    matches = sorted(_matches(source, report))
    for path in matches:
        found = _stat(path, report)
        if found is None or _identity(found) in refused:
            continue
        if _identity(found) in seen:
            report.skip(path, "a link to a file that is there already")
            continue
        seen.add(_identity(found))
        files.append(SourceFile(path, found.st_size, found.st_mtime_ns))
    if not files:
        takes_all = matches and refused
        why = "the validation glob takes every file that matches" if takes_all else "no file matches"
        raise ValueError(f"{why} {source!r} (looked from {os.getcwd()}){report.reasons()}")
    return files


def suffix_of(path: str) -> str:
    """The lower-case suffix, without that of a compression: ".jsonl" of "a.JSONL.gz"."""
    path = path.lower()
    for compression in COMPRESSED:
        path = path.removesuffix(compression)
    return os.path.splitext(path)[1]


def spells_out(source: str) -> bool:
    """Whether `source` itself says what kind of file it wants: one file, or a glob that ends in a plain suffix."""
    pattern = os.path.expanduser(source)
    if source == STDLIB or os.path.isdir(pattern):
        return False
    suffix = suffix_of(pattern)
    return glob.escape(pattern) == pattern or (bool(suffix) and glob.escape(suffix) == suffix)


def stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _matches(source: str, report: CorpusReport) -> Iterator[str]:
    pattern = os.path.expanduser(source)
    if source == STDLIB:
        yield from _stdlib_files()
    elif os.path.isdir(pattern):
        yield from _walk(pattern, report)
    elif "**" in pattern.split(os.sep):
        yield from _below(pattern, report)
    else:
        for path in glob.glob(pattern):
            if not os.path.isdir(path):
                yield path
            elif suffix_of(path) in SHARDS:  # Spark writes a folder of parts under such a name
                yield from _walk(path, report)


def _below(pattern: str, report: CorpusReport) -> Iterator[str]:
    """Matches of a glob with `**`. Python's own would follow a link upwards round and round."""
    parts = pattern.split(os.sep)
    wild = parts.index("**")
    for root in glob.glob(os.sep.join([*parts[:wild], ""]) or "./"):
        for path in _walk(root, report):
            if _fits(os.path.relpath(path, root).split(os.sep), parts[wild:]):
                yield path


def _fits(names: list[str], pattern: list[str]) -> bool:
    """Whether a path fits a glob, both in parts; `**` stands for any number of folders."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_fits(names[i:], pattern[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _walk(root: str, report: CorpusReport) -> Iterator[str]:
    """All files below `root`, through links too, but each folder once: a link upwards ends here."""
    seen = set()

    def complain(error: OSError) -> None:
        report.skip(error.filename, "unreadable folder", error.strerror or "")

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=complain):
        real = os.path.realpath(folder)
        subfolders[:] = [] if real in seen else sorted(n for n in subfolders if not n.startswith("."))
        yield from (os.path.join(folder, n) for n in names if real not in seen and not n.startswith("."))
        seen.add(real)


def _stat(path: str, report: CorpusReport) -> os.stat_result | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        report.skip(path, "a link that leads nowhere")
    except OSError as error:
        report.skip(path, "unreadable file", error.strerror or "")
    else:
        if stat.S_ISREG(found.st_mode):
            return found
        report.skip(path, "not a regular file")
    return None


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _stdlib_files() -> Iterator[str]:
    """Paths of the standard library's sources. Raises ValueError where this Python came without them."""
    root, found = stdlib_folder(), False
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT_FOLDERS]
        for name in names:
            # _sysconfigdata holds the build paths of this one machine.
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "test_")):
                found = True
                yield os.path.join(folder, name)
    require(found, f"this Python has no .py sources in {root}: set source to a glob of your own text files")

"""Rows of JSON lines and Parquet files, each with its file and line: what conversations and prompts are made of.

A fault ends the reading, with an error of one line that names the row: a set of conversations is made by hand or by
program, and what is lost of it without a word is found months later. (Plain text is read otherwise: `readers.py`.)
"""

import contextlib
import gzip
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import zstandard

from deepseek_jax.checks import named, require
from deepseek_jax.data import unpacking
from deepseek_jax.data.files import SHARDS, SourceFile, find_files, spells_out, suffix_of
from deepseek_jax.data.report import CorpusReport
from deepseek_jax.json_files import parse_object

_PARQUET_ROWS = 1024  # at once
_OF_TEMPLATES = ("messages", "prompt", "completion", "tools")  # fields that templates write out
_DAMAGED = (EOFError, OSError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, pyarrow.ArrowException)


class Row(NamedTuple):
    """name: "FILE:LINE", lines of text from 1, rows of Parquet from 0. values: its fields."""

    name: str
    values: dict[str, Any]


@contextlib.contextmanager
def of_row(row: Row) -> Iterator[None]:
    """Puts the row's name before a ValueError that the block raises, and makes one line of it: templates write several."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row.name}: {' '.join(str(error).split())}") from error


def row_files(source: str, report: CorpusReport) -> list[SourceFile]:
    """The files of a glob, a folder or one file that hold rows; others of a folder are named in `report`.

    Raises ValueError: there is none.
    """
    wanted, spelled = [], spells_out(source)
    for file in find_files(source, report):
        if spelled or suffix_of(file.path) in SHARDS:
            wanted.append(file)
        else:
            report.skip(file.path, "not of rows", f"{', '.join(SHARDS)} are")
    require(bool(wanted), f"no file of {source!r} holds rows{report.reasons()}")
    report.files += len(wanted)
    return wanted


def read_rows(files: Iterable[SourceFile]) -> Iterator[Row]:
    """Yields the rows of all files in order. Raises ValueError for the first that is none, by name."""
    for path in (file.path for file in files):
        try:
            yield from _parquet(path) if suffix_of(path) == ".parquet" else _json_lines(path)
        except _DAMAGED as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{path} is damaged, truncated or unreadable: {reason}") from error


def _json_lines(path: str) -> Iterator[Row]:
    for number, line in enumerate(unpacking.lines(unpacking.chunks(path)), start=1):
        name = f"{path}:{number}"
        if line is None:
            raise ValueError(f"{name} is longer than {unpacking.MAX_DOCUMENT_BYTES >> 20} MiB")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield Row(name, parse_object(line, name))


def _parquet(path: str) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            with named(f"{path}, rows {number} to {number + len(batch) - 1}: "):
                values = batch.to_pylist()
            for row in values:
                given = {name: _as_given(row[name]) for name in _OF_TEMPLATES if name in row}
                yield Row(f"{path}:{number}", {**row, **given})
                number += 1


def _as_given(value: Any) -> Any:
    """Without the fields that are None: Parquet gives each object those of all others in its place."""
    if isinstance(value, dict):
        return {name: _as_given(inner) for name, inner in value.items() if inner is not None}
    return [_as_given(inner) for inner in value] if isinstance(value, list) else value

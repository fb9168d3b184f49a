"""Reads documents out of files: plain text, JSON lines and Parquet, plain or compressed.

Real folders hold broken things. A bad line, an empty file, a wrong encoding, a truncated archive or a file of no
known format is counted and named in a `CorpusReport` and skipped; everything readable around it is kept.

Memory is bounded, whatever the files: a line, row or field beyond `unpacking.MAX_DOCUMENT_BYTES` is skipped and named;
a longer plain text becomes documents of up to `PART_BYTES`, cut after a line break.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

from deepseek_jax.data import unpacking
from deepseek_jax.data.files import COMPRESSED, suffix_of
from deepseek_jax.data.report import CorpusReport, Document

_PARQUET_ROWS = 1024  # decoded at once, at most; of large texts fewer

# Suffixes that stand for text on their own. Anything else is text only where the source spells it out.
_TEXT = re.compile(
    r"\.(txt|text|md|markdown|rst|tex|org|adoc|srt"
    r"|py|pyi|pyx|c|h|cc|cpp|cxx|hh|hpp|cu|cuh|java|kt|scala|groovy|go|rs|zig|swift|m|mm|js|jsx|mjs|ts|tsx|rb|php|pl|pm"
    r"|lua|r|jl|cs|fs|vb|dart|hs|ml|mli|elm|el|lisp|clj|scm|ex|exs|erl|nim|d|pas|ada|f|f90|f95|asm|s|v|sv|vhd|sh|bash"
    r"|ps1|sql|lean|agda|idr)"
)
_ABOUT = frozenset(("readme", "license", "licence", "copying", "notice", "authors", "changelog"))
_UNKNOWN = "not of a known format"


def read_file(path: str, text_field: str, report: CorpusReport, named: bool = False) -> Iterator[Document]:
    """Yields the documents of one file, `.gz` and `.zst` unpacked.

    Parquet and JSON lines (`.jsonl`, `.ndjson`, or any file whose first line is a JSON object with `text_field`): one
    document per row or line, of the column or field `text_field`. Text: one document, of a file whose suffix says so;
    text whose first line is a JSON object is JSON lines, too. A README or licence, which is about the corpus, and any
    other file is skipped, unless `named`: the source spells its suffix out. Faults go to `report`, never raise.
    """
    report.files += 1
    try:
        for document in _documents(path, text_field, report, named):
            if fault := _text_fault(document.text):
                report.skip(document.name, fault)
            else:
                report.keep(document)
                yield document
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        report.skip(path, "damaged or truncated archive", str(error))
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: Parquet's names are no text
        report.skip(path, "unreadable file", str(error).partition("\n")[0])


def _documents(path: str, text_field: str, report: CorpusReport, named: bool) -> Iterator[Document]:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _parquet_documents(path, text_field, report)
    if suffix in (".jsonl", ".ndjson"):
        return _json_documents(path, text_field, report)
    if not named and Path(path).name.lower().partition(".")[0] in _ABOUT:
        report.skip(path, _UNKNOWN, "a text about the others")
        return iter(())
    lines = unpacking.lines(unpacking.chunks(path))
    head = next((line for line in lines if line is None or line.strip()), b"")
    record = _record(head)
    if record is not None and (text_field in record or _TEXT.fullmatch(suffix) or named):
        return _json_documents(path, text_field, report)
    if head and head.startswith(b"PAR1"):
        return _parquet_documents(path, text_field, report)
    if _TEXT.fullmatch(suffix) or (named and suffix != ".json"):
        return _text_documents(path, report)
    report.skip(path, _UNKNOWN)
    return iter(())


def _record(line: bytes | None) -> dict[str, Any] | None:
    """Returns the JSON object in a line, or None if the line is no object."""
    if not line or not line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        return None
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _text_fault(text: str) -> str | None:
    if not text.strip():
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "lone surrogate, not valid Unicode text"
    return None


def _text_documents(path: str, report: CorpusReport) -> Iterator[Document]:
    offset = 0
    for number, data in enumerate(unpacking.parts(unpacking.chunks(path)), start=1):
        name = path if number == 1 else f"{path} (part {number})"
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            report.skip(name, "not UTF-8", f"byte {data[error.start]:#04x} at offset {offset + error.start}")
        else:
            # ASCII in UTF-16 or UTF-32 is valid UTF-8 full of NULs; no text file of ours has one.
            if "\0" in text:
                report.skip(name, "not UTF-8", f"NUL byte at offset {offset + data.index(0)}")
            else:
                yield Document(name, text)
        offset += len(data)


def _json_documents(path: str, text_field: str, report: CorpusReport) -> Iterator[Document]:
    number = 0
    for number, line in enumerate(unpacking.lines(unpacking.chunks(path)), start=1):
        name = f"{path}:{number}"
        if line is None:
            report.skip(name, f"longer than {unpacking.MAX_DOCUMENT_BYTES >> 20} MiB")
        elif line.strip() and (text := _json_text(name, line, text_field, report)) is not None:
            yield Document(name, text)
    if number == 0:
        report.skip(path, "empty")


def _json_text(name: str, line: bytes, text_field: str, report: CorpusReport) -> str | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        report.skip(name, "not UTF-8", f"byte {line[error.start]:#04x} at offset {error.start} of the line")
        return None
    except (ValueError, RecursionError) as error:
        report.skip(name, "not JSON", str(error))
        return None
    if not isinstance(record, dict):
        report.skip(name, "not a JSON object", f"the line holds a {type(record).__name__}")
    elif text_field not in record:
        report.skip(name, f"no field {text_field!r}", f"fields: {', '.join(sorted(record)[:8])}")
    elif not isinstance(record[text_field], str):
        report.skip(name, f"field {text_field!r} is not a string", type(record[text_field]).__name__)
    else:
        return record[text_field]
    return None


def _parquet_documents(path: str, text_field: str, report: CorpusReport) -> Iterator[Document]:
    if path.lower().endswith(COMPRESSED):
        report.skip(path, "unreadable file", "Parquet compresses by itself: unpack the .gz or .zst around it")
        return
    with pyarrow.parquet.ParquetFile(path, buffer_size=unpacking.CHUNK_BYTES) as file:
        columns, rows = file.schema_arrow.names, file.metadata.num_rows
        if text_field not in columns:
            report.skip(path, f"no column {text_field!r}", f"columns: {', '.join(columns[:8])}")
            return
        if rows == 0:
            report.skip(path, "empty")
            return
        kind = file.schema_arrow.field(columns.index(text_field)).type
        if not _holds_text(kind):
            report.skip(path, f"column {text_field!r} is not a string", str(kind), count=rows)
            return
        row = 0
        for batch in file.iter_batches(columns=[text_field], batch_size=_rows_at_once(file.metadata)):
            for value in batch.column(0):
                name, row = f"{path}:{row}", row + 1
                if (text := _parquet_text(name, value, text_field, report)) is not None:
                    yield Document(name, text)


def _rows_at_once(metadata: pyarrow.parquet.FileMetaData) -> int:
    """As many rows as make about a document of the largest size, by the mean of the largest row group."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    mean = max(group.total_byte_size // max(1, group.num_rows) for group in groups)
    return max(1, min(_PARQUET_ROWS, unpacking.MAX_DOCUMENT_BYTES // max(1, mean)))


def _holds_text(kind: pyarrow.DataType) -> bool:
    """Whether a column has strings, or bytes, which some writers declare instead of strings."""
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pyarrow.types, f"is_{test}")(kind) for test in tests)


def _parquet_text(name: str, value: pyarrow.Scalar, text_field: str, report: CorpusReport) -> str | None:
    value = value.value if isinstance(value, pyarrow.DictionaryScalar) else value
    data = value.as_buffer()
    if data is None:
        report.skip(name, f"column {text_field!r} is not a string", "NoneType")
    elif data.size > unpacking.MAX_DOCUMENT_BYTES:
        report.skip(name, f"longer than {unpacking.MAX_DOCUMENT_BYTES >> 20} MiB")
    else:
        try:
            return data.to_pybytes().decode()
        except UnicodeDecodeError as error:
            report.skip(name, "not UTF-8", str(error))
    return None

"""Reads documents out of files: plain text, JSON lines and Parquet, plain or compressed.

Real folders hold broken things. A bad line, an empty file, a wrong encoding or a truncated archive is
counted and named in a `CorpusReport` and skipped; everything readable around it is kept.
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import zstandard

CHUNK_BYTES = 1 << 20
MAX_EXAMPLES = 8


class Document(NamedTuple):
    """One text with the name it is reported under: a path, or `path:line` / `path:row`."""

    name: str
    text: str


@dataclasses.dataclass
class CorpusReport:
    """What was read and what was skipped.

    Attributes:
        files: files opened.
        documents: documents kept.
        num_bytes: UTF-8 bytes of the documents kept.
        skipped: number of skipped files, lines or rows by kind of fault.
        examples: the first few faults as (name, reason).
    """

    files: int = 0
    documents: int = 0
    num_bytes: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def keep(self, document: Document) -> None:
        self.documents += 1
        self.num_bytes += len(document.text.encode())

    def skip(self, name: str, kind: str, detail: str = "") -> None:
        """Counts a fault of `kind` (a short fixed phrase) and remembers the first few in full."""
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append((name, f"{kind}: {detail}" if detail else kind))

    def summary(self) -> str:
        """One line for a log, plus one line for each remembered fault."""
        head = f"{self.documents} documents, {self.num_bytes / 1e6:.2f} MB from {self.files} files"
        if not self.skipped:
            return head
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items()))
        faults = [f"  {name}: {reason}" for name, reason in self.examples]
        if self.num_skipped > len(faults):
            faults.append(f"  ... and {self.num_skipped - len(faults)} more")
        return "\n".join([f"{head}; skipped {self.num_skipped} ({kinds}):", *faults])


def read_file(path: str, text_field: str, report: CorpusReport) -> Iterator[Document]:
    """Yields the documents of one file; the kind follows from the name (`.gz` and `.zst` are unpacked first).

    `.jsonl`, `.ndjson`: one document per line, the string under `text_field`. `.parquet`: one per row, the
    column `text_field`. Anything else is one UTF-8 document. Faults go to `report`, never raise.
    """
    report.files += 1
    inner = path.lower().removesuffix(".gz").removesuffix(".zst")
    if inner.endswith(".parquet"):
        documents = _parquet_documents(path, text_field, report)
    elif inner.endswith((".jsonl", ".ndjson")):
        documents = _json_documents(path, text_field, report)
    else:
        documents = _text_document(path, report)
    try:
        for document in documents:
            if fault := _text_fault(document.text):
                report.skip(document.name, fault)
            else:
                report.keep(document)
                yield document
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        report.skip(path, "damaged or truncated archive", str(error))
    except (OSError, pyarrow.ArrowException) as error:
        report.skip(path, "unreadable file", str(error).splitlines()[0])


def _text_fault(text: str) -> str | None:
    if not text.strip():
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "lone surrogate, not valid Unicode text"
    return None


def _text_document(path: str, report: CorpusReport) -> Iterator[Document]:
    data = b"".join(_chunks(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.skip(path, "not UTF-8", f"byte {data[error.start]:#04x} at offset {error.start}")
        return
    # ASCII in UTF-16 or UTF-32 is valid UTF-8 full of NULs; no text file of ours has one.
    if "\0" in text:
        report.skip(path, "not UTF-8", f"NUL byte at offset {data.index(0)}")
        return
    yield Document(path, text)


def _json_documents(path: str, text_field: str, report: CorpusReport) -> Iterator[Document]:
    number = 0
    for number, line in enumerate(_lines(_chunks(path)), start=1):
        if not line.strip():
            continue
        name = f"{path}:{number}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            report.skip(
                name, "not UTF-8", f"byte {line[error.start]:#04x} at offset {error.start} of the line"
            )
            continue
        except (ValueError, RecursionError) as error:
            report.skip(name, "not JSON", str(error))
            continue
        if not isinstance(record, dict):
            report.skip(name, "not a JSON object", f"the line holds a {type(record).__name__}")
        elif text_field not in record:
            report.skip(name, f"no field {text_field!r}", f"fields: {', '.join(sorted(record)[:8])}")
        elif not isinstance(record[text_field], str):
            report.skip(name, f"field {text_field!r} is not a string", type(record[text_field]).__name__)
        else:
            yield Document(name, record[text_field])
    if number == 0:
        report.skip(path, "empty")


def _parquet_documents(path: str, text_field: str, report: CorpusReport) -> Iterator[Document]:
    if not path.lower().endswith(".parquet"):
        report.skip(path, "unreadable file", "Parquet compresses by itself: unpack the .gz or .zst around it")
        return
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if text_field not in columns:
            report.skip(path, f"no column {text_field!r}", f"columns: {', '.join(columns[:8])}")
            return
        row = -1
        for batch in file.iter_batches(columns=[text_field], batch_size=1024):
            for value in batch.column(0):
                row += 1
                text, name = value.as_py(), f"{path}:{row}"
                if isinstance(text, str):
                    yield Document(name, text)
                else:
                    report.skip(name, f"column {text_field!r} is not a string", type(text).__name__)
        if row < 0:
            report.skip(path, "empty")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines only: when `chunks` raises, the unfinished line is dropped with it."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _chunks(path: str) -> Iterator[bytes]:
    """The (decompressed) bytes of a file; an archive that ends early raises EOFError."""
    if path.lower().endswith(".zst"):
        yield from _zstd_chunks(path)
        return
    with gzip.open(path) if path.lower().endswith(".gz") else Path(path).open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(path: str) -> Iterator[bytes]:
    # zstandard's own stream reader takes a truncated frame for a normal end, so frames are followed here.
    decompressor, in_frame = zstandard.ZstdDecompressor().decompressobj(), False
    with Path(path).open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            while block:
                chunk = decompressor.decompress(block)
                block, in_frame = decompressor.unused_data, not decompressor.eof
                if decompressor.eof:
                    decompressor = zstandard.ZstdDecompressor().decompressobj()
                yield chunk
    if in_frame:
        raise EOFError("the zstd frame ends before its end marker")

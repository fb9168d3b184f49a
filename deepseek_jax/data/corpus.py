"""The documents to train on: the interpreter's own standard library, or the user's files.

`source="stdlib"` needs no download: every Python installation carries about 10 MB of readable, documented
source code. Any other source is a glob, a folder or a file (see readers.py for the formats).

A corpus is a list of files until it is read, once, as a stream. Memory holds one document at a time.
"""

import collections
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.data.files import STDLIB, SourceFile, find_files, spells_out, stdlib_folder
from deepseek_jax.data.readers import read_file
from deepseek_jax.data.report import CorpusReport, Document

TRAIN, VALIDATION = "train", "validation"


@dataclasses.dataclass
class Reading:
    """A pass over the documents fills a `Reading` with a report and hashes, whose size does not grow with the documents.

    Attributes:
        report: what was read and skipped.
        files: of each file in order, the hash of its documents; None without documents.
    """

    report: CorpusReport = dataclasses.field(default_factory=CorpusReport)
    files: list[str | None] = dataclasses.field(default_factory=list)
    splits: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {split: hashlib.sha256() for split in (TRAIN, VALIDATION)}
    )

    def fingerprint(self, split: str) -> str:
        """Hash of the texts of `split` in order; independent of where the files lie."""
        return self.splits[split].hexdigest()[:16]


class Corpus:
    """Named documents in two disjoint splits, the same in every process that sees the same files.

    The standard library splits by file (hash of the relative path). The user's documents split by hash of their
    content, so that a duplicate never sits on both sides. Where a hash split would leave a side empty, the nearest
    document moves over, and a lone document is cut in two at a line break.

    Args:
        source: "stdlib", a glob (`**` allowed), a folder or a file.
        text_field: field of JSON lines and column of Parquet files.
        validation_fraction: expected share of documents in the validation split; None: all are for training.
        left_out: glob or folder of files of `source` that do not belong to this corpus.

    Raises:
        ValueError: nothing matches, or the fraction is not inside (0, 1).
    """

    def __init__(
        self,
        source: str = STDLIB,
        text_field: str = "text",
        validation_fraction: float | None = 0.05,
        left_out: str | None = None,
    ):
        if validation_fraction is not None and not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie inside (0, 1), got {validation_fraction}")
        self.source, self.text_field = source, text_field
        self.validation_fraction, self.left_out = validation_fraction, left_out
        self._named = spells_out(source)
        self._find_report = CorpusReport()
        self.files = self._find(self._find_report)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files on disk."""
        return sum(file.size for file in self.files)

    def files_now(self) -> list[SourceFile]:
        """Lists the files again; a difference from `files` means that one changed."""
        return self._find(CorpusReport())

    def _find(self, report: CorpusReport) -> list[SourceFile]:
        left_out = find_files(self.left_out, CorpusReport()) if self.left_out else []
        return find_files(self.source, report, left_out)

    def read(self, reading: Reading) -> Iterator[tuple[str, Document]]:
        """Yields (split, document) of all documents, in a fixed order, in one pass that `reading` takes notes of.

        Raises:
            ValueError: there is no document, or there are too few to split.
        """
        edge = self._edge
        reading.report.add(self._find_report)
        for file in self.files:
            for document in self._noted(file, reading.report, reading.files):
                for split, part in self._sides(file, document, edge):
                    reading.splits[split].update(_digest(part.text))
                    yield split, part

    def sample(self, max_chars: int) -> Iterator[str]:
        """Training texts of up to about `max_chars` characters, from the start of each file by its share of bytes."""
        edge, total, taken, passed = self._edge, max(1, self.num_bytes), 0, 0
        for file in self.files:
            passed += file.size
            allowed = max_chars * passed // total
            if taken >= allowed:
                continue
            for document in self._read_file(file, CorpusReport()):
                texts = [part.text for split, part in self._sides(file, document, edge) if split == TRAIN]
                yield from texts
                taken += sum(map(len, texts))
                if taken >= allowed:
                    break

    def digests_if_same(
        self, files: Iterable[SourceFile], digests: Iterable[str | None]
    ) -> list[str | None] | None:
        """The digests of the present files, if `files`, which had `digests`, held the same documents; else None.

        Only files that differ in name, size or time are read, up to the first that differs in content.
        """
        known = dict(zip(files, digests, strict=False))  # files that a damaged list lacks are read
        before = filter(None, known.values())
        now: list[str | None] = []
        for file in self.files:
            if file in known:
                now.append(known[file])
            else:
                collections.deque(self._noted(file, CorpusReport(), now), maxlen=0)
            if now[-1] is not None and now[-1] != next(before, None):
                return None
        return now if next(before, None) is None else None

    def _noted(self, file: SourceFile, report: CorpusReport, digests: list[str | None]) -> Iterator[Document]:
        """Yields the documents of `file`, then appends their hash to `digests`, or None if there was no document."""
        digest = None
        for document in self._read_file(file, report):
            digest = digest or hashlib.sha256()
            digest.update(_digest(document.text))
            yield document
        digests.append(None if digest is None else digest.hexdigest()[:32])

    def _read_file(self, file: SourceFile, report: CorpusReport) -> Iterator[Document]:
        return read_file(file.path, self.text_field, report, self._named)

    def _sides(self, file: SourceFile, document: Document, edge: float) -> Iterator[tuple[str, Document]]:
        if math.isnan(edge):
            head, tail = self._halves(document)
            yield TRAIN, Document(f"{document.name} (head)", head)
            yield VALIDATION, Document(f"{document.name} (tail)", tail)
        else:
            yield (VALIDATION if self._share(file, document) < edge else TRAIN), document

    def _halves(self, document: Document) -> tuple[str, str]:
        text, fraction = document.text, self.validation_fraction or 0.0
        middle = int(len(text) * (1 - fraction))
        middle = text.find("\n", middle, len(text) - 1) + 1 or middle
        return text[:middle], text[middle:]

    def _share(self, file: SourceFile, document: Document) -> float:
        """A number in [0, 1) that depends on the text alone; in the standard library, on the file's name."""
        if self.source == STDLIB:
            key = Path(file.path).relative_to(stdlib_folder()).as_posix().encode()
        else:
            key = _digest(document.text)
        return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2**48

    @functools.cached_property
    def _edge(self) -> float:
        """Documents whose share is below the edge are for validation; NaN: the only document is cut in two.

        Reads until both sides have a document, which is soon, or to the end of a corpus too small for that.
        """
        fraction, report = self.validation_fraction, CorpusReport()
        report.add(self._find_report)
        lowest, highest, lone = 1.0, -1.0, None
        for file in self.files:
            for document in self._read_file(file, report):
                share = self._share(file, document)
                lowest, highest, lone = min(lowest, share), max(highest, share), document
                if fraction is None or lowest < fraction <= highest:
                    return fraction or 0.0
        if lone is None or fraction is None:
            raise ValueError(f"nothing readable in {self.source!r} ({report.files} files){report.reasons()}")
        if report.documents == 1:
            if not all(self._halves(lone)):
                raise ValueError(
                    f"{self.source!r} holds one document of {len(lone.text)} characters: too short"
                )
            return math.nan
        if lowest == highest:
            raise ValueError(
                f"{self.source!r} holds one text {report.documents} times: no other is left for validation; "
                "give more text, or a validation glob"
            )
        return math.nextafter(lowest, 1.0) if lowest >= fraction else highest


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]

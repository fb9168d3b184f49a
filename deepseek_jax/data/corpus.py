"""The documents to train on: the interpreter's own standard library, or the user's files.

`source="stdlib"` needs no download: every Python installation carries about 10 MB of readable, documented
source code. Any other source is a glob or a folder (see readers.py for the formats).

Documents are read again for each pass and never held together in memory, so a corpus may be larger than it.
"""

import dataclasses
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deepseek_jax.data.readers import CorpusReport, Document, read_file

STDLIB = "stdlib"
TRAIN, VALIDATION = "train", "validation"

# Installed packages are not the standard library; tests would double its size; encodings and pydoc_data are
# generated tables and help texts, each a large and unlike share of whichever split it falls into.
_LEFT_OUT_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data")
)


@dataclasses.dataclass(frozen=True)
class _Scan:
    """What one pass over the source found: a digest of each document and its side of the split."""

    digests: list[bytes]
    is_validation_n: np.ndarray


class Corpus:
    """Named documents in two disjoint splits, the same in every process that sees the same files.

    The standard library splits by file (hash of the relative path). The user's documents split by hash of
    their content, so that a duplicate never sits on both sides; or `validation` names a second glob. Where a
    hash split would leave a side empty the nearest document moves over, and a lone document is cut in two at
    a line break.

    Args:
        source: "stdlib", a glob (`**` allowed) or a folder.
        validation: glob or folder of the validation documents; its files are left out of training.
        text_field: field of JSON lines and column of Parquet files.
        validation_fraction: expected share of documents in the validation split; unused with `validation`.

    Raises:
        ValueError: nothing matches, nothing is readable, or the fraction is not inside (0, 1).
    """

    def __init__(
        self,
        source: str = STDLIB,
        validation: str | None = None,
        text_field: str = "text",
        validation_fraction: float = 0.05,
    ):
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie inside (0, 1), got {validation_fraction}")
        self.source, self.validation, self.text_field = source, validation, text_field
        self.validation_fraction = validation_fraction
        self.report = CorpusReport()
        self._lone = False
        held_out = find_files(validation) if validation else []
        self._files = {TRAIN: find_files(source, left_out=held_out), VALIDATION: held_out}
        self._scan = self._scan_source()

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the documents of `split` ("train" or "validation") in a fixed order.

        Raises:
            ValueError: a file changed since the corpus was opened.
        """
        want = {TRAIN: False, VALIDATION: True}[split]
        scan, index = self._scan, -1
        for index, document in enumerate(self._read(CorpusReport())):
            if index >= len(scan.digests) or _digest(document.text) != scan.digests[index]:
                raise ValueError(f"{document.name} changed while the corpus was being read: start again")
            if scan.is_validation_n[index] == want:
                yield document
        if index + 1 != len(scan.digests):
            raise ValueError(
                f"files of {self.source!r} vanished while the corpus was being read: start again"
            )

    def fingerprint(self, split: str) -> str:
        """Hash of the texts of `split` in order; independent of where the files lie."""
        want = {TRAIN: False, VALIDATION: True}[split]
        digest = hashlib.sha256()
        for index in np.flatnonzero(self._scan.is_validation_n == want):
            digest.update(self._scan.digests[index])
        return digest.hexdigest()[:16]

    def _read(self, report: CorpusReport) -> Iterator[Document]:
        for path in self._files[TRAIN] + self._files[VALIDATION]:
            for document in read_file(path, self.text_field, report):
                yield from self._cut(document) if self._lone else (document,)

    def _cut(self, document: Document) -> Iterator[Document]:
        text = document.text
        middle = int(len(text) * (1 - self.validation_fraction))
        middle = text.find("\n", middle, len(text) - 1) + 1 or middle
        yield Document(f"{document.name} (head)", text[:middle])
        yield Document(f"{document.name} (tail)", text[middle:])

    def _scan_source(self) -> _Scan:
        digests: list[bytes] = []
        shares: list[float] = []
        counts: dict[str, int] = {}
        for split in (TRAIN, VALIDATION):
            for path in self._files[split]:
                for document in read_file(path, self.text_field, self.report):
                    digests.append(_digest(document.text))
                    shares.append(_share(self._split_key(path, digests[-1])))
            counts[split] = len(digests) - sum(counts.values())
            if counts[split] == 0 and (split == TRAIN or self.validation):
                raise ValueError(self._nothing_readable(self.source if split == TRAIN else self.validation))
        if self.validation:
            return _Scan(digests, np.repeat([False, True], [counts[TRAIN], counts[VALIDATION]]))
        if len(digests) == 1:
            self._lone = True
            halves = [document.text for document in self._read(CorpusReport())]
            if not all(halves):
                raise ValueError(
                    f"{self.source!r} holds one document of {len(halves[0])} characters: too short"
                )
            return _Scan([_digest(text) for text in halves], np.array([False, True]))
        share_n = np.array(shares)
        is_validation_n = share_n < self.validation_fraction
        if not is_validation_n.any() or is_validation_n.all():
            edge = np.argmin(share_n) if not is_validation_n.any() else np.argmax(share_n)
            is_validation_n[edge] ^= True
        return _Scan(digests, is_validation_n)

    def _split_key(self, path: str, digest: bytes) -> bytes:
        if self.source != STDLIB:
            return digest
        return Path(path).relative_to(_stdlib_folder()).as_posix().encode()

    def _nothing_readable(self, source: str | None) -> str:
        files = sorted(self._files[TRAIN] + self._files[VALIDATION])
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.report.examples)
        return f"nothing readable in {source!r} ({len(files)} files matched): {reasons}"


def find_files(source: str, left_out: list[str] | tuple[str, ...] = ()) -> list[str]:
    """Sorted files of "stdlib", a glob or a folder, less those in `left_out`.

    Raises:
        ValueError: no file matches.
    """
    if source == STDLIB:
        return list(_stdlib_files())
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**", "*")
    refused = {os.path.realpath(path) for path in left_out}
    matches = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    files = sorted(path for path in matches if os.path.realpath(path) not in refused)
    if not files:
        why = "no file matches" if not matches else "the validation glob takes every file that matches"
        raise ValueError(f"{why} {source!r} (looked from {os.getcwd()})")
    return files


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> Iterator[str]:
    root = _stdlib_folder()
    found = False
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _LEFT_OUT_FOLDERS)
        for name in sorted(names):
            # _sysconfigdata holds the build paths of this one machine.
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "test_")):
                found = True
                yield os.path.join(folder, name)
    if not found:
        raise ValueError(
            f"this Python has no .py sources in {root}: set source to a glob of your own text files"
        )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def _share(key: bytes) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2**48

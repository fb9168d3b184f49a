"""`encode_corpus` encodes all documents of a corpus once, in one pass over the files, and keeps the ids on disk.

Encoding is the slow part of a first start; every later one maps the finished ids into memory instead and reads
neither texts nor ids: it takes as long for a large corpus as for a small one. An entry of the cache (cache.py) holds,
for each side of the split:

    train.ids      uint16 or int32 [num_tokens], documents end to end, each ending with eos
    train.starts   int64 [num_documents + 1], where each document begins; the last entry is num_tokens
    train.counts   int64 [vocab_size], how often each id occurs
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data import cache, unpacking
from deepseek_jax.data.corpus import TRAIN, VALIDATION, Corpus, Reading
from deepseek_jax.data.encoding import encode_documents
from deepseek_jax.data.files import STDLIB
from deepseek_jax.data.report import CorpusReport
from deepseek_jax.data.tokenizer import Tokenizer

FORMAT = 1  # version of an entry; entries of another version are made again
CHECKED_BYTES = (
    1 << 26
)  # ids up to this size are checked whole at every start, larger files by their size alone
_BLOCK_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokenizedDocuments:
    """Ids of documents laid end to end, each ending with eos.

    Attributes:
        ids: uint16 or int32 [num_tokens], mapped from disk.
        starts: int64 [num_documents + 1], mapped from disk: where each document begins; the last is num_tokens.
        counts_v: int64 [vocab_size], how often each id occurs.
    """

    ids: np.ndarray
    starts: np.ndarray
    counts_v: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.starts[index + 1]]


@dataclasses.dataclass(frozen=True)
class EncodedCorpus:
    """Both sides of a corpus as token ids, and what was found when it was read.

    Attributes:
        fingerprint: hash of the training texts in order, wherever they lie.
        report: what was read and skipped.
    """

    train: TokenizedDocuments
    validation: TokenizedDocuments
    fingerprint: str
    report: CorpusReport


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path) -> EncodedCorpus:
    """The ids of `corpus`, from `cache_dir` where its files have not changed since they were encoded."""
    return cache.open_entry(
        cache_dir / f"tokens-{corpus_key(corpus, tokenizer.fingerprint)}",
        corpus.files,
        what=f"tokenizing {corpus.source} ({corpus.num_bytes / 1e6:,.0f} MB of files)",
        files_now=corpus.files_now,
        load=lambda folder, meta: _load(folder, meta, tokenizer.vocab_size),
        renewed=functools.partial(_renewed, corpus),
        make=lambda folder: _make(folder, corpus, tokenizer),
    )


def corpus_key(corpus: Corpus, *more: Any) -> str:
    """Returns a name for an entry that is made of a corpus: it depends on the settings, not on the files."""
    source = corpus.source
    place = source if source == STDLIB else os.path.abspath(os.path.expanduser(source))
    limits = (unpacking.MAX_DOCUMENT_BYTES, unpacking.PART_BYTES)
    settings = [place, corpus.text_field, corpus.validation_fraction, corpus.left_out, *limits]
    return hashlib.sha256(json.dumps([FORMAT, settings, more]).encode()).hexdigest()[:16]


class _Writer:
    """Writes one side of the split, a block of ids at a time."""

    def __init__(self, folder: Path, split: str, vocab_size: int):
        self._ids = (folder / f"{split}.ids").open("wb")
        self._starts = (folder / f"{split}.starts").open("wb")
        self._dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
        self._counts_v, self._counts_file = np.zeros(vocab_size, np.int64), folder / f"{split}.counts"
        self._waiting: list[np.ndarray] = []
        self._num_waiting, self._num_tokens, self._num_documents, self._crc32 = 0, 0, 0, 0
        self._starts.write(np.int64(0).tobytes())

    def add(self, ids: np.ndarray) -> None:
        self._waiting.append(ids)
        self._num_waiting += len(ids)
        if self._num_waiting >= _BLOCK_TOKENS:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        ids = np.concatenate(self._waiting)
        data = ids.astype(self._dtype).tobytes()
        ends = self._num_tokens + np.cumsum([len(document) for document in self._waiting], dtype=np.int64)
        self._ids.write(data)
        self._starts.write(ends.tobytes())
        self._crc32 = zlib.crc32(data, self._crc32)
        self._counts_v += np.bincount(ids, minlength=len(self._counts_v))
        self._num_tokens, self._num_documents = int(ends[-1]), self._num_documents + len(ends)
        self._waiting, self._num_waiting = [], 0

    def finish(self) -> dict[str, Any]:
        """Writes the rest, and returns the meta of this side."""
        self._write()
        self._counts_file.write_bytes(self._counts_v.tobytes())
        return {
            "dtype": self._dtype.name,
            "num_tokens": self._num_tokens,
            "num_documents": self._num_documents,
            "crc32": self._crc32,
        }

    def close(self) -> None:
        self._ids.close()
        self._starts.close()


def _make(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> cache.Meta:
    reading, sides = Reading(), collections.deque[str]()

    def texts() -> Iterator[str]:
        for split, document in corpus.read(reading):
            sides.append(split)
            yield document.text

    writers = {split: _Writer(folder, split, tokenizer.vocab_size) for split in (TRAIN, VALIDATION)}
    try:
        for ids in encode_documents(texts(), tokenizer):
            writers[sides.popleft()].add(ids)
        described = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    return described | {
        "digests": reading.files,
        "fingerprint": reading.fingerprint(TRAIN),
        "report": reading.report.to_json(),
    }


def _renewed(corpus: Corpus, files: cache.Files, meta: cache.Meta) -> cache.Meta | None:
    digests = corpus.digests_if_same(files, meta["digests"])
    return None if digests is None else meta | {"digests": digests}


def _load(folder: Path, meta: cache.Meta, vocab_size: int) -> EncodedCorpus | None:
    """The entry, or None when it is damaged."""
    train, validation = (_load_side(folder, split, meta[split], vocab_size) for split in (TRAIN, VALIDATION))
    if train is None or validation is None:
        return None
    return EncodedCorpus(train, validation, meta["fingerprint"], CorpusReport.from_json(meta["report"]))


def _load_side(folder: Path, split: str, meta: dict[str, Any], vocab_size: int) -> TokenizedDocuments | None:
    ids = _mapped(folder / f"{split}.ids", meta["dtype"], meta["num_tokens"])
    starts = _mapped(folder / f"{split}.starts", "int64", meta["num_documents"] + 1)
    counts_v = np.fromfile(folder / f"{split}.counts", np.int64)
    whole = len(counts_v) == vocab_size and starts[0] == 0 and starts[-1] == len(ids)
    if whole and ids.nbytes <= CHECKED_BYTES:
        whole = zlib.crc32(ids.data) == meta["crc32"] and bool((np.diff(starts) > 0).all())
    return TokenizedDocuments(ids, starts, counts_v) if whole else None


def _mapped(path: Path, dtype: str, length: int) -> np.ndarray:
    """The array in a file. Raises ValueError for a file of another size."""
    size = path.stat().st_size
    if size != length * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} has {size} bytes, not {length} x {dtype}")
    return np.memmap(path, dtype, "r") if length else np.empty(0, dtype)

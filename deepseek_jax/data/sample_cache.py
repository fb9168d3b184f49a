"""The samples of rows, made once and kept on disk: rendering and encoding a million conversations takes minutes.

An entry of the cache (cache.py) holds

    ids       uint16 or int32 [num_tokens], samples end to end
    learned   bool [num_tokens], which tokens are labels
    starts    int64 [n + 1], where each sample begins; the last entry is num_tokens
    labels    int64 [n], how many tokens of each are labels
    rows      int64 [n, 2], of each sample the file and the number of its row
    shares    float64 [n], of each sample's question (rows.py)
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checks import named, require
from deepseek_jax.data import cache
from deepseek_jax.data.conversations import Conversations, Sample, question_of
from deepseek_jax.data.report import CorpusReport
from deepseek_jax.data.rows import read_rows, row_files, share_of
from deepseek_jax.data.tokenizer import Tokenizer

FORMAT = 1  # version of an entry; entries of another version are made again
_ROWS = 256  # rendered before they are encoded together


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples, mapped from disk. For the arrays, see above.

    Attributes:
        files: paths of the rows' files.
        fingerprint: hash of ids and labels.
        report: what of the source holds no rows.
    """

    ids: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    shares: np.ndarray
    files: tuple[str, ...]
    fingerprint: str
    report: CorpusReport

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Sample:
        here = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return Sample(self.ids[here], self.learned[here])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n]"""
        return np.diff(self.starts)

    def name(self, index: int) -> str:
        """ "FILE:LINE" of the row of a sample."""
        file, number = self.rows[index].tolist()
        return f"{self.files[file]}:{number}"


class _Found(NamedTuple):
    """A sample and its row: which file, which line, which share of the question."""

    sample: Sample
    file: int
    number: int
    share: float


def samples_of(source: str, tokenizer: Tokenizer, learn: str, cache_dir: Path) -> Samples:
    """The samples of all rows of a glob, a folder or a file, from `cache_dir` where the files have not changed.

    Raises ValueError: no rows, or one that is none or has nothing to learn, by file and line.
    """
    report = CorpusReport()
    files = row_files(source, report)
    template = tokenizer.chat_template.sources if tokenizer.has_chat_template else {}
    made_of = [FORMAT, os.path.abspath(os.path.expanduser(source)), learn, tokenizer.fingerprint, template]
    key = hashlib.sha256(json.dumps([*made_of, tokenizer.stop_ids]).encode()).hexdigest()[:16]
    report.files = len(files)

    def load(folder: Path, meta: cache.Meta) -> Samples | None:
        return _load(folder, meta, report)

    return cache.open_entry(
        cache_dir / f"samples-{key}",
        files,
        what=f"rendering and tokenizing {source} ({sum(file.size for file in files) / 1e6:,.1f} MB of rows)",
        files_now=lambda: row_files(source, CorpusReport()),
        load=load,
        renewed=lambda _files, _meta: None,
        make=lambda folder: _make(folder, _found(files, Conversations(tokenizer, learn)), files, tokenizer),
    )


def _found(files: cache.Files, conversations: Conversations) -> Iterator[_Found]:
    for file, one in enumerate(files):
        rows = read_rows([one])
        while batch := list(itertools.islice(rows, _ROWS)):
            turns, shares = [], []
            for row in batch:
                with named(f"{row.name}: "):
                    turns.append(conversations.turns(row.values))
                    shares.append(share_of(question_of(row.values)))
            for row, share, samples in zip(batch, shares, conversations.samples(turns), strict=True):
                number = int(row.name.rpartition(":")[2])
                yield from (_Found(sample, file, number, share) for sample in samples)


def _make(folder: Path, found: Iterable[_Found], files: cache.Files, tokenizer: Tokenizer) -> cache.Meta:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    digest, starts = hashlib.sha256(), [0]
    labels, rows, shares = [], [], []
    with (folder / "ids").open("wb") as ids, (folder / "learned").open("wb") as learned:
        for (sample_ids, said), *row, share in found:
            for file, array in ((ids, sample_ids.astype(dtype)), (learned, said)):
                file.write(array.tobytes())
                digest.update(array.tobytes())
            digest.update(np.float64(share).tobytes())
            starts.append(starts[-1] + len(sample_ids))
            labels.append(int(said.sum()))
            rows.append(row)
            shares.append(share)
    require(len(starts) > 1, "there is no row in any file")
    for name, values, kind in (
        ("starts", starts, np.int64),
        ("labels", labels, np.int64),
        ("rows", rows, np.int64),
        ("shares", shares, np.float64),
    ):
        np.array(values, kind).tofile(folder / name)
    return {
        "dtype": dtype.name,
        "size": len(shares),
        "tokens": starts[-1],
        "files": [file.path for file in files],
        "fingerprint": digest.hexdigest()[:16],
    }


def _load(folder: Path, meta: cache.Meta, report: CorpusReport) -> Samples | None:
    """The entry, or None when it is damaged."""
    size, tokens = meta["size"], meta["tokens"]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "ids": (meta["dtype"], (tokens,)),
        "learned": ("bool", (tokens,)),
        "starts": ("int64", (size + 1,)),
        "labels": ("int64", (size,)),
        "rows": ("int64", (size, 2)),
        "shares": ("float64", (size,)),
    }
    arrays = {name: _mapped(folder / name, *shape) for name, shape in shapes.items()}
    whole = arrays["starts"][0] == 0 and arrays["starts"][-1] == tokens
    return (
        Samples(**arrays, files=tuple(meta["files"]), fingerprint=meta["fingerprint"], report=report)
        if whole
        else None
    )


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a file. Raises ValueError for a file of another size."""
    found: Any = np.memmap(path, dtype, "r")
    return found.reshape(shape)

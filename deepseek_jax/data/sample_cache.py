"""The samples of rows, made once and kept on disk: rendering and encoding a million conversations takes minutes.

An entry of the cache (cache.py) holds

    ids       uint16 or int32 [num_tokens], samples end to end
    learned   bool [num_tokens], which tokens are labels
    starts    int64 [n + 1], where each sample begins; the last entry is num_tokens
    labels    int64 [n], how many tokens of each are labels
    rows      int64 [n, 2], of each sample the file and the number of its row
    shares    float64 [n], of each sample's question (held_out.py)
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checks import require
from deepseek_jax.data import cache
from deepseek_jax.data.conversations import Conversations, Sample
from deepseek_jax.data.held_out import share
from deepseek_jax.data.report import CorpusReport
from deepseek_jax.data.row_fields import question_of
from deepseek_jax.data.rows import of_row, read_rows, row_files
from deepseek_jax.data.token_cache import CHECKED_BYTES
from deepseek_jax.data.tokenizer import Tokenizer

FORMAT = 2  # version of an entry; entries of another version are made again
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
    """A sample, the name of its row, and the share of the question."""

    sample: Sample
    row: str
    share: float


def samples_of(source: str, tokenizer: Tokenizer, learn: str, cache_dir: Path) -> Samples:
    """The samples of all rows of a glob, a folder or a file, from `cache_dir` where the files have not changed.

    Raises ValueError: no rows, or one that is none or has nothing to learn, by file and line.
    """
    report = CorpusReport()
    files = row_files(source, report)
    place = os.path.abspath(os.path.expanduser(source))
    template = dict(tokenizer.chat_template.sources) if tokenizer.has_chat_template else {}
    made_of = [FORMAT, place, learn, tokenizer.fingerprint, tokenizer.stop_ids, template]
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    return cache.open_entry(
        cache_dir / f"samples-{name}",
        files,
        what=f"rendering and tokenizing {source} ({sum(file.size for file in files) / 1e6:,.1f} MB of files)",
        files_now=lambda: row_files(source, CorpusReport()),
        load=lambda folder, meta: _load(folder, meta, report),
        renewed=lambda _files, _meta: None,
        make=lambda folder: _make(folder, _found(files, Conversations(tokenizer, learn)), tokenizer),
    )


def _found(files: cache.Files, conversations: Conversations) -> Iterator[_Found]:
    rows = read_rows(files)
    while batch := list(itertools.islice(rows, _ROWS)):
        turns, shares = [], []
        for row in batch:
            with of_row(row):
                turns.append(conversations.turns(row.values))
                shares.append(share(question_of(row.values)))
        for row, place, samples in zip(batch, shares, conversations.samples(turns), strict=True):
            yield from (_Found(sample, row.name, place) for sample in samples)


class _File:
    """An array written piece by piece; crc32 of all so far."""

    def __init__(self, path: Path, dtype: str):
        self._file, self._dtype, self.crc32 = path.open("wb"), dtype, 0

    def write(self, piece: np.ndarray) -> bytes:
        data = piece.astype(self._dtype).tobytes()
        self._file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        return data

    def close(self) -> None:
        self._file.close()


def _make(folder: Path, found: Iterable[_Found], tokenizer: Tokenizer) -> cache.Meta:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "int32"
    digest, names = hashlib.sha256(), dict[str, int]()
    lists: dict[str, list[Any]] = {"starts": [0], "labels": [], "rows": [], "shares": []}
    with (
        contextlib.closing(_File(folder / "ids", dtype)) as ids,
        contextlib.closing(_File(folder / "learned", "bool")) as learned,
    ):
        for (sample_ids, said), row, place in found:
            digest.update(ids.write(sample_ids) + learned.write(said) + np.float64(place).tobytes())
            path, _, number = row.rpartition(":")
            lists["starts"].append(lists["starts"][-1] + len(sample_ids))
            lists["labels"].append(int(said.sum()))
            lists["rows"].append((names.setdefault(path, len(names)), int(number)))
            lists["shares"].append(place)
    size, tokens = len(lists["shares"]), lists["starts"][-1]
    require(size > 0, "there is no row in any file")
    for name, values in lists.items():
        np.array(values, _shapes(size, tokens, dtype)[name][0]).tofile(folder / name)
    return {
        "dtype": dtype,
        "size": size,
        "tokens": tokens,
        "files": list(names),
        "fingerprint": digest.hexdigest()[:16],
        "crc32": {"ids": ids.crc32, "learned": learned.crc32},
    }


def _shapes(size: int, tokens: int, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of each array."""
    return {
        "ids": (dtype, (tokens,)),
        "learned": ("bool", (tokens,)),
        "starts": ("int64", (size + 1,)),
        "labels": ("int64", (size,)),
        "rows": ("int64", (size, 2)),
        "shares": ("float64", (size,)),
    }


def _load(folder: Path, meta: cache.Meta, report: CorpusReport) -> Samples | None:
    """The entry, or None when it is damaged."""
    shapes = _shapes(meta["size"], meta["tokens"], meta["dtype"])
    arrays = {name: _mapped(folder / name, *shape) for name, shape in shapes.items()}
    whole = arrays["starts"][0] == 0 and arrays["starts"][-1] == meta["tokens"]
    if arrays["ids"].nbytes <= CHECKED_BYTES:
        whole &= all(zlib.crc32(arrays[name].data) == crc32 for name, crc32 in meta["crc32"].items())
    if not whole:
        return None
    return Samples(**arrays, files=tuple(meta["files"]), fingerprint=meta["fingerprint"], report=report)


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a file. Raises ValueError for a file of another size."""
    found: Any = np.memmap(path, dtype, "r")
    return found.reshape(shape)

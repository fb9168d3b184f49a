"""Token ids of all documents, encoded once and kept on disk.

Encoding is the slow part of a start; a resumed run maps the finished ids into memory instead. A cache entry
is a folder named after the documents and the tokenizer; it appears whole or not at all, and its checksum is
tested before use: a damaged entry is built anew.
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from deepseek_jax.data.cuts import LINES
from deepseek_jax.data.tokenizer import Tokenizer

BATCH_CHARS = 4 << 20  # encoded at once: bounds the memory of the encoder's own records
PIECE_CHARS = 1 << 18  # a longer document is encoded in pieces, in parallel, if that changes nothing
_BLOCK_TOKENS = 1 << 24


@dataclasses.dataclass(frozen=True)
class TokenizedDocuments:
    """Ids of documents laid end to end, each ending with eos.

    Attributes:
        ids: uint16 or int32 [num_tokens], mapped from disk.
        starts: int64 [num_documents + 1], where each document begins; the last entry is num_tokens.
    """

    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size]: how often each id occurs."""
        total_v = np.zeros(vocab_size, np.int64)
        for start in range(0, len(self.ids), _BLOCK_TOKENS):
            total_v += np.bincount(self.ids[start : start + _BLOCK_TOKENS], minlength=vocab_size)
        return total_v


def tokenize(texts: Iterable[str], tokenizer: Tokenizer, cache_dir: Path, name: str) -> TokenizedDocuments:
    """Returns the ids of `texts`, from the entry `name` of `cache_dir` where it is whole.

    `name` must identify the texts; the tokenizer's fingerprint is added here. `texts` is read only on a miss.
    """
    entry = cache_dir / f"tokens-{name}-{tokenizer.fingerprint}"
    documents = _read_entry(entry)
    if documents is None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(entry, ignore_errors=True)
        building = Path(tempfile.mkdtemp(dir=cache_dir, prefix=f"{entry.name}."))
        try:
            _write_entry(building, texts, tokenizer)
            try:
                os.rename(building, entry)
            except OSError:  # another process has just finished the same entry
                if _read_entry(entry) is None:
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        documents = _read_entry(entry)
    if documents is None:
        raise OSError(f"{entry} was written but does not read back: is the disk full or failing?")
    return documents


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields int32 ids of each text followed by eos, encoding a few MB at a time in parallel."""
    eos = np.array([tokenizer.eos_id], np.int32)
    parts: list[np.ndarray] = []  # of the document at hand, which may reach over several batches
    for batch in _piece_batches(texts, tokenizer.cuts):
        encoded = tokenizer.encode_batch([piece for piece, _ in batch])
        for ids, (_, is_last) in zip(encoded, batch, strict=True):
            parts.append(np.array(ids, np.int32))
            if is_last:
                yield np.concatenate([*parts, eos])
                parts = []


def _piece_batches(texts: Iterable[str], cuts: re.Pattern[str] | None) -> Iterator[list[tuple[str, bool]]]:
    """Batches of (piece, whether it ends its document), each of about `BATCH_CHARS` characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        *heads, last = split_text(text, cuts)
        for piece, is_last in [*((head, False) for head in heads), (last, True)]:
            batch.append((piece, is_last))
            size += len(piece)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def split_text(text: str, cuts: re.Pattern[str] | None = LINES, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Cuts a long text into pieces of about `limit` characters that encode as the whole does.

    Args:
        cuts: `Tokenizer.cuts`; default: that of the tokenizers that we train. A text without such a place is left
            whole.
    """
    start = 0
    while cuts is not None and (found := cuts.search(text, start + limit)):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _write_entry(folder: Path, texts: Iterable[str], tokenizer: Tokenizer) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    starts, checksum = [0], 0
    with (folder / "ids.bin").open("wb") as file:
        for ids in encode_documents(texts, tokenizer):
            data = ids.astype(dtype).tobytes()
            checksum = zlib.crc32(data, checksum)
            file.write(data)
            starts.append(starts[-1] + len(ids))
    np.save(folder / "starts.npy", np.array(starts, np.int64))
    described = {
        "dtype": dtype.name,
        "num_tokens": starts[-1],
        "num_documents": len(starts) - 1,
        "crc32": checksum,
    }
    (folder / "meta.json").write_text(json.dumps(described))


def _read_entry(folder: Path) -> TokenizedDocuments | None:
    """The entry, or None when it is absent or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r")
        starts = np.load(folder / "starts.npy")
        whole = (
            starts.shape == (meta["num_documents"] + 1,)
            and starts[0] == 0
            and starts[-1] == len(ids) == meta["num_tokens"]
            and bool((np.diff(starts) > 0).all())
            and _checksum(ids) == meta["crc32"]
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return TokenizedDocuments(ids, starts) if whole else None


def _checksum(ids: np.ndarray) -> int:
    checksum = 0
    for start in range(0, len(ids), _BLOCK_TOKENS):
        checksum = zlib.crc32(ids[start : start + _BLOCK_TOKENS].data, checksum)
    return checksum

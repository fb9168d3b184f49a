"""Texts are encoded to token ids, a bounded number of characters at a time."""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from deepseek_jax.data.cuts import LINES
from deepseek_jax.data.tokenizer import Tokenizer

BATCH_CHARS = 4 << 20  # encoded at once: bounds the memory of the encoder's own records
PIECE_CHARS = 1 << 18  # a longer document is encoded in pieces, in parallel, if that changes nothing


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields int32 ids of each text followed by eos, encoding a few MB at a time in parallel."""
    eos = np.array([tokenizer.eos_id], np.int32)
    parts: list[np.ndarray] = []  # ids of the present document, which may span several batches
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

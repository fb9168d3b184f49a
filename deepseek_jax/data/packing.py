"""Packs documents into windows of equal length, without padding (report §4.1).

Documents, each ending with eos, are laid end to end into one stream. Window i holds the tokens
[i * seq_len, i * seq_len + seq_len + 1) of it: seq_len inputs, and for every input the next token. Windows overlap by
one token, so every token is a target once, except the stream's first token and a rest shorter than a window. (The
targets of MTP modules lie inside the window, as in section 2.2.)

An epoch permutes all documents and packs them block by block, each block a stream of its own with the next few
thousand documents. What FIM and the splitter make of a document is made when its block is opened, so that an epoch of
any length begins at once and takes the memory of a block.

Attention crosses document borders, as in DeepSeek's pre-training. For a mask (SFT), `segments` adds to each
token the number of its document within the window (from 1) and its position within that document, counted
from the document's first token in the window.

Legend: n documents, l = seq_len + 1.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from deepseek_jax.data.fim import choose_documents, fim_documents
from deepseek_jax.data.punctuation import PunctuationSplitter
from deepseek_jax.data.shuffle import permuted
from deepseek_jax.data.token_cache import TokenizedDocuments
from deepseek_jax.data.tokenizer import Tokenizer

# Tokens of a block: many documents, so that its shuffled windows are a fair sample, and many windows, because half a
# window on average is lost at its end (0.05% with sequences of 4096).
BLOCK_TOKENS = 1 << 22
BLOCK_WINDOWS = 64  # at least

_ORDER = 104  # keeps this random stream apart from FIM's and the splitter's
_GROUP = 64  # documents decoded and encoded at once


class Windows(Protocol):
    """Windows by number, arrays [l] by name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...

    def require_a_window(self) -> None: ...


class PackedStream:
    """Random access to the windows of one packed stream.

    Args:
        documents: ids of the plain documents.
        seq_len: inputs of a window, and the distance from one window to the next.
        segments: also give "segments" and "positions".
        order: int64 [n], which documents, and which comes when; None: all, as they are.
        altered: ids that stand in for a document's plain ids. Only these are held in memory.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        seq_len: int,
        segments: bool = False,
        order: np.ndarray | None = None,
        altered: Mapping[int, np.ndarray] | None = None,
    ):
        self._documents, self._order, self._altered = documents, order, altered or {}
        self._seq_len, self._length, self._segments = seq_len, seq_len + 1, segments
        self._starts = documents.starts if order is None else self._laid_out(order)

    def _laid_out(self, order: np.ndarray) -> np.ndarray:
        """Where each document of `order` begins, and the end: int64 [n + 1]."""
        length_n = np.asarray(self._documents.starts[order + 1] - self._documents.starts[order])
        for place, index in enumerate(order.tolist()):
            if index in self._altered:
                length_n[place] = len(self._altered[index])
        return np.concatenate([[0], np.cumsum(length_n, dtype=np.int64)])

    def __len__(self) -> int:
        return max(0, int(self._starts[-1] - 1) // self._seq_len)

    def require_a_window(self) -> None:
        """Raises ValueError where the stream is shorter than one window."""
        if len(self) == 0:
            raise ValueError(
                f"{self._starts[-1]} tokens in {len(self._starts) - 1} documents are less than one window of "
                f"{self._length} (seq_len {self._seq_len} + 1): give more text, or lower seq_len"
            )

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Window `index`: "tokens" int32 [l], with `segments` also "segments" and "positions", int32 [l]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        first = int(index) * self._seq_len
        place = int(np.searchsorted(self._starts, first, side="right")) - 1
        window = {"tokens": np.empty(self._length, np.int32)}
        if self._segments:
            window |= {name: np.empty(self._length, np.int32) for name in ("segments", "positions")}
        filled, segment = 0, 0
        while filled < self._length:
            offset, segment = first + filled - int(self._starts[place]), segment + 1
            ids = self._ids(place)[offset : offset + self._length - filled]
            here = slice(filled, filled + len(ids))
            window["tokens"][here] = ids
            if self._segments:
                window["segments"][here] = segment
                window["positions"][here] = np.arange(len(ids))
            filled, place = filled + len(ids), place + 1
        return window

    def _ids(self, place: int) -> np.ndarray:
        index = place if self._order is None else int(self._order[place])
        return self._altered[index] if index in self._altered else self._documents[index]


@dataclasses.dataclass(frozen=True)
class EpochPacker:
    """Builds the blocks of each epoch: document order, FIM and punctuation splits are drawn anew.

    Everything drawn depends on (seed, epoch, block, document) alone, so any process can rebuild any block.

    Raises:
        ValueError: FIM without FIM tokens, or too little text.
    """

    documents: TokenizedDocuments
    tokenizer: Tokenizer
    seq_len: int
    fim_rate: float = 0.0
    split_punctuation_rate: float = 0.0
    segments: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.fim_rate > 0:
            for name in ("fim_begin", "fim_hole", "fim_end"):
                self.tokenizer.special_id(name)
        PackedStream(self.documents, self.seq_len).require_a_window()

    @functools.cached_property
    def _splitter(self) -> PunctuationSplitter:
        return PunctuationSplitter(self.tokenizer)

    @functools.cached_property
    def num_blocks(self) -> int:
        """Blocks of an epoch: as many documents each, give or take one, and a few million tokens on average."""
        tokens = max(BLOCK_TOKENS, BLOCK_WINDOWS * self.seq_len)
        return min(max(1, round(len(self.documents.ids) / tokens)), len(self.documents))

    def block(self, epoch: int, block: int) -> PackedStream:
        """The packed stream of a block of an epoch, both from 0. It may lack windows, but not all of an epoch do."""
        size, num_blocks = len(self.documents), self.num_blocks
        places = np.arange(block * size // num_blocks, (block + 1) * size // num_blocks)
        order = permuted(places, size, (_ORDER, self.seed, epoch))
        altered = self._altered(order.tolist(), epoch, block)
        return PackedStream(self.documents, self.seq_len, self.segments, order, altered)

    def _altered(self, order: list[int], epoch: int, block: int) -> dict[int, np.ndarray]:
        altered: dict[int, np.ndarray] = {}
        chosen = [order[i] for i in choose_documents(len(order), self.fim_rate, self.seed, epoch, block)]
        for start in range(0, len(chosen), _GROUP):
            group = chosen[start : start + _GROUP]
            # The text comes back from the ids: byte-level ids are as good as the text, and already at hand.
            texts = self.tokenizer.decode_batch([self.documents[i][:-1].tolist() for i in group])
            altered |= zip(group, fim_documents(texts, group, self.tokenizer, self.seed, epoch), strict=True)
        if self.split_punctuation_rate > 0:
            for i in order:
                ids = altered.get(i, self.documents[i])
                split = self._splitter.split(ids, self.split_punctuation_rate, self.seed, epoch, i)
                if split is not ids:
                    altered[i] = split
        return altered

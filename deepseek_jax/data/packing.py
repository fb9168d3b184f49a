"""Packs documents into windows of equal length, without padding (report §4.1).

Documents, each ending with eos, are laid end to end into one stream. Window i holds the tokens
[i * seq_len, i * seq_len + seq_len + 1 + mtp_depth) of it: seq_len inputs, and for every input the next token
and the mtp_depth tokens after that, which are the targets of the main model and of the MTP modules. Windows
overlap by those 1 + mtp_depth tokens, so every token is the main model's target once per epoch, except the
stream's first token and a rest shorter than a window.

Attention crosses document borders, as in DeepSeek's pre-training. For a mask (SFT), `segments` adds to each
token the number of its document within the window (from 1) and its position within that document, counted
from the document's first token in the window.

Legend: n documents, l = seq_len + 1 + mtp_depth.
"""

import dataclasses
import functools

import numpy as np

from deepseek_jax.data.fim import choose_documents, fim_documents
from deepseek_jax.data.punctuation import PunctuationSplitter
from deepseek_jax.data.token_cache import TokenizedDocuments
from deepseek_jax.data.tokenizer import Tokenizer

_ORDER = 104  # keeps this random stream apart from FIM's and the splitter's
_GROUP = 64  # documents decoded and encoded at once


class PackedStream:
    """Random access to the windows of one packed stream; a data source for grain.

    Args:
        documents: ids of the plain documents.
        order: int64 [n], which document comes when.
        altered: ids that stand in for a document's plain ids. Only these are held in memory.
        seq_len: inputs of a window, and the distance from one window to the next.
        mtp_depth: number of MTP modules.
        segments: also give "segments" and "positions".

    Raises:
        ValueError: the stream is shorter than one window.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        order: np.ndarray,
        altered: dict[int, np.ndarray],
        seq_len: int,
        mtp_depth: int,
        segments: bool = False,
    ):
        self._documents, self._order, self._altered = documents, order, altered
        self._seq_len, self._length, self._segments = seq_len, seq_len + 1 + mtp_depth, segments
        length_n = np.diff(documents.starts)
        for index, ids in altered.items():
            length_n[index] = len(ids)
        self._starts = np.concatenate([[0], np.cumsum(length_n[order])])
        if self._starts[-1] < self._length:
            raise ValueError(
                f"{self._starts[-1]} tokens in {len(order)} documents are less than one window of "
                f"{self._length} (seq_len {seq_len} + 1 + mtp_depth {mtp_depth}): give more text, "
                "or lower seq_len"
            )

    def __repr__(self) -> str:
        return f"PackedStream(documents={len(self._order)}, windows={len(self)})"

    def __len__(self) -> int:
        return int(self._starts[-1] - self._length) // self._seq_len + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Window `index`: "tokens" int32 [l], with `segments` also "segments" and "positions", int32 [l]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        first = int(index) * self._seq_len
        document = int(np.searchsorted(self._starts, first, side="right")) - 1
        window = {"tokens": np.empty(self._length, np.int32)}
        if self._segments:
            window |= {name: np.empty(self._length, np.int32) for name in ("segments", "positions")}
        filled, segment = 0, 0
        while filled < self._length:
            offset, segment = first + filled - int(self._starts[document]), segment + 1
            ids = self._ids(int(self._order[document]))[offset : offset + self._length - filled]
            here = slice(filled, filled + len(ids))
            window["tokens"][here] = ids
            if self._segments:
                window["segments"][here] = segment
                window["positions"][here] = np.arange(len(ids))
            filled, document = filled + len(ids), document + 1
        return window

    def _ids(self, index: int) -> np.ndarray:
        return self._altered[index] if index in self._altered else self._documents[index]


@dataclasses.dataclass(frozen=True)
class EpochPacker:
    """Builds the stream of each epoch: document order, FIM and punctuation splits are drawn anew.

    Everything drawn depends on (seed, epoch, document) alone, so any process can rebuild any epoch.

    Raises:
        ValueError: a rate outside [0, 1], a length that is no length, or FIM without FIM tokens.
    """

    documents: TokenizedDocuments
    tokenizer: Tokenizer
    seq_len: int
    mtp_depth: int = 0
    fim_rate: float = 0.0
    split_punctuation_rate: float = 0.0
    segments: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("fim_rate", "split_punctuation_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name, least in (("seq_len", 1), ("mtp_depth", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.fim_rate > 0:
            for name in ("fim_begin", "fim_hole", "fim_end"):
                self.tokenizer.special_id(name)

    @functools.cached_property
    def _splitter(self) -> PunctuationSplitter:
        return PunctuationSplitter(self.tokenizer)

    def epoch(self, epoch: int) -> PackedStream:
        """The packed stream of epoch number `epoch`, from 0."""
        order = np.random.default_rng((_ORDER, self.seed, epoch)).permutation(len(self.documents))
        return self._pack(order, self._altered(epoch))

    def in_order(self) -> PackedStream:
        """The plain documents in their own order, nothing random: for validation."""
        return self._pack(np.arange(len(self.documents)), {})

    def _pack(self, order: np.ndarray, altered: dict[int, np.ndarray]) -> PackedStream:
        return PackedStream(self.documents, order, altered, self.seq_len, self.mtp_depth, self.segments)

    def _altered(self, epoch: int) -> dict[int, np.ndarray]:
        altered: dict[int, np.ndarray] = {}
        chosen = choose_documents(len(self.documents), self.fim_rate, self.seed, epoch).tolist()
        for start in range(0, len(chosen), _GROUP):
            group = chosen[start : start + _GROUP]
            # The text comes back from the ids: byte-level ids are as good as the text, and already at hand.
            texts = self.tokenizer.decode_batch([self.documents[i][:-1].tolist() for i in group])
            altered |= zip(group, fim_documents(texts, group, self.tokenizer, self.seed, epoch), strict=True)
        if self.split_punctuation_rate > 0:
            for i in range(len(self.documents)):
                ids = altered.get(i, self.documents[i])
                split = self._splitter.split(ids, self.split_punctuation_rate, self.seed, epoch, i)
                if split is not ids:
                    altered[i] = split
        return altered

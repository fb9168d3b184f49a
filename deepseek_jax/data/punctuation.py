"""Random split of tokens that join punctuation with line breaks (report §4.1).

A vocabulary with tokens such as ")\\n\\n" meets prompts that end before the line break in a form it never saw
in training ("token boundary bias"). DeepSeek splits a certain proportion of such tokens during training; the
report does not give the proportion.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer

_SPLIT = 103  # keeps this random stream apart from FIM's


class PunctuationSplitter:
    """Replaces combined tokens by the ids of the punctuation and the ids of the line breaks.

    Attributes:
        combined: int64 [n], the ids that can be split; none unless the ids stand for fixed bytes, as DeepSeek's do.
    """

    def __init__(self, tokenizer: Tokenizer):
        texts = tokenizer.decode_batch([[i] for i in range(tokenizer.vocab_size)])
        heads = [_punctuation_head(text) for text in texts]
        found = np.flatnonzero(heads)
        halves = [part for i in found for part in (texts[i][: heads[i]], texts[i][heads[i] :])]
        encoded = tokenizer.encode_batch(halves) if halves else []
        joined = [head + tail for head, tail in zip(encoded[0::2], encoded[1::2], strict=True)]
        same = [_same_bytes(tokenizer, int(i), piece) for i, piece in zip(found, joined, strict=True)]
        self.combined = found[np.array(same, bool)]
        pieces = [piece for piece, is_same in zip(joined, same, strict=True) if is_same]
        # pieces_vp[i, :length_v[i]] replaces id i; other ids stand for themselves.
        width = max((len(piece) for piece in pieces), default=1)
        self._length_v = np.ones(tokenizer.vocab_size, np.int64)
        self._pieces_vp = np.zeros((tokenizer.vocab_size, width), np.int32)
        for i, piece in zip(self.combined, pieces, strict=True):
            self._length_v[i] = len(piece)
            self._pieces_vp[i, : len(piece)] = piece
        self._is_combined_v = np.zeros(tokenizer.vocab_size, bool)
        self._is_combined_v[self.combined] = True

    def split(self, ids: np.ndarray, rate: float, seed: int, epoch: int, index: int) -> np.ndarray:
        """Splits each combined token of document `index` with probability `rate`; the text stays the same."""
        at = np.flatnonzero(self._is_combined_v[ids])
        if not len(at):
            return ids
        rng = np.random.default_rng((_SPLIT, seed, epoch, index))
        at = at[rng.random(len(at)) < rate]
        lengths = np.ones(len(ids), np.int64)
        lengths[at] = self._length_v[ids[at]]
        out = np.repeat(ids.astype(np.int32), lengths)
        starts = (np.cumsum(lengths) - lengths)[at]
        for offset in range(self._pieces_vp.shape[1]):
            here = lengths[at] > offset
            out[starts[here] + offset] = self._pieces_vp[ids[at[here]], offset]
        return out


def _same_bytes(tokenizer: Tokenizer, token_id: int, pieces: Sequence[int]) -> bool:
    """Whether the pieces stand for the token's bytes, wherever they are."""
    whole, *parts = (tokenizer.token_bytes(int(i)) for i in (token_id, *pieces))
    return None not in (whole, *parts) and whole == b"".join(part or b"" for part in parts)


def _punctuation_head(text: str) -> int:
    """Characters before the line breaks in "punctuation then line breaks"; 0 for any other token."""
    head = text.rstrip("\r\n")
    marks = head.removeprefix(" ")
    if len(head) == len(text) or not marks:
        return 0
    return len(head) if all(unicodedata.category(mark)[0] in "PS" for mark in marks) else 0

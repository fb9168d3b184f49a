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
        # The ids that replace a combined one.
        self._pieces = {
            int(i): np.array(piece, np.int32)
            for i, piece in zip(found, joined, strict=True)
            if _same_bytes(tokenizer, int(i), piece)
        }
        self.combined = np.array(list(self._pieces), np.int64)
        self._is_combined_v = np.zeros(tokenizer.vocab_size, bool)
        self._is_combined_v[self.combined] = True

    def split(self, ids: np.ndarray, rate: float, seed: int, epoch: int, index: int) -> np.ndarray:
        """Splits each combined token of document `index` with probability `rate`; the text stays the same."""
        at = np.flatnonzero(self._is_combined_v[ids])
        if not len(at):
            return ids
        rng = np.random.default_rng((_SPLIT, seed, epoch, index))
        parts, rest = [], 0
        for place in at[rng.random(len(at)) < rate].tolist():
            parts += [ids[rest:place], self._pieces[int(ids[place])]]
            rest = place + 1
        return np.concatenate([*parts, ids[rest:]]).astype(np.int32)


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

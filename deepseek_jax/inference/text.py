"""The text of rows while they are generated, up to the first stop string."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from deepseek_jax.data.streaming import StopStrings, StreamDecoder
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.batch import Completion


class TextRow:
    """Decodes tokens as they come and looks for stop strings, also where these span several tokens.

    Of several, the one that is complete first ends the row, however the text is cut into tokens. What may be the
    beginning of one is held back until it is decided.

    Args:
        before: the ids that the text goes on from; () if it is one of its own.

    Attributes:
        text: so far, without what is held back, nor a stop string.
        ended: whether a stop string came.
        count: tokens read; if it ended, up to the one that completed the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        self._decoder, self._stop = (
            StreamDecoder(tokenizer, skip_special=True, before=before),
            StopStrings(stop),
        )
        self.text, self.count = "", 0

    @property
    def ended(self) -> bool:
        return self._stop.ended

    def push(self, tokens: Iterable[int]) -> str:
        """Text to show after these tokens more."""
        before = len(self.text)
        for token in tokens:
            if self.ended:
                break
            self.count += 1
            self.text += self._stop.push(self._decoder.push(token))
        return self.text[before:]

    def close(self) -> str:
        """Text that was held back, at the end of the row."""
        last = self._stop.push(self._decoder.flush()) + self._stop.flush()
        self.text += last
        return last


class Texts:
    """The texts of a batch; of none without a tokenizer.

    Args:
        before: the ids that the text of each row goes on from.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], before: Sequence[Sequence[int]]):
        self._rows = [] if tokenizer is None else [TextRow(tokenizer, stop, ids) for ids in before]

    def push(self, rows: Sequence[Completion]) -> list[str]:
        """What each row shows since the last time."""
        return [text.push(row.tokens[text.count :]) for text, row in zip(self._rows, rows, strict=False)]

    def ended(self) -> np.ndarray:
        """bool [rows]: where a stop string came."""
        return np.array([text.ended for text in self._rows], bool)

    def close(self, rows: Sequence[Completion]) -> tuple[list[str], list[Completion]]:
        """What each row shows at its end; and all of it, cut off where a stop string came."""
        last = [a + text.close() for a, text in zip(self.push(rows), self._rows, strict=True)]
        return last, [_cut(row, text) for row, text in zip(rows, self._rows, strict=True)] if last else list(
            rows
        )


def _cut(row: Completion, text: TextRow) -> Completion:
    if not text.ended:
        return dataclasses.replace(row, text=text.text)
    n = text.count
    return Completion(row.tokens[:n], "stop", row.logprobs[:n], row.sampled_logprobs[:n], text.text)

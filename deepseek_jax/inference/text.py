"""The text of a row while it is generated, up to the first stop string."""

from collections.abc import Iterable, Sequence

from deepseek_jax.data.streaming import StopStrings, StreamDecoder
from deepseek_jax.data.tokenizer import Tokenizer


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

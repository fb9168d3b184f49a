"""Text as it comes: `StreamDecoder` makes it of ids, `StopStrings` finds its end; each holds back only what is not certain."""

from collections.abc import Iterable, Mapping, Sequence

from deepseek_jax.data.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes ids one at a time; a character split over several ids comes out once, when it is whole.

    Bytes that can no longer become a character come out at once, as U+FFFD; only what may still become one is held
    back. All parts together are what `Tokenizer.decode` gives, except where byte tokens ("<0xE6>") mix whole and
    broken characters: there it gives up the whole ones, too.

    Args:
        skip_special: leave out special tokens, as in `Tokenizer.decode`.
        before: the ids that the text goes on from, as in `Tokenizer.text_after`.
        named: ids that come out as these texts, special or not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special: bool = False,
        before: Sequence[int] = (),
        named: Mapping[int, str] | None = None,
    ):
        self._tokenizer, self._skip, self._named = tokenizer, skip_special, named or {}
        self._pending = b""
        # The id before, on which the text of the next may depend.
        self._before = [i for i in before if not (skip_special and tokenizer.is_special(i))][-1:]

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often "" inside a multi-byte character."""
        token_id = int(token_id)
        if token_id in self._named:
            self._before = [token_id]
            return self._broken() + self._named[token_id]
        if self._skip and self._tokenizer.is_special(token_id):
            return ""
        raw = self._tokenizer.token_bytes(token_id)
        if raw is None:
            text = self._broken() + self._tokenizer.text_after(self._before, [token_id])
        else:
            text, self._pending = self._certain(self._pending + raw)
        self._before = [token_id]
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        self._before = []
        return self._broken()

    def _certain(self, raw: bytes) -> tuple[str, bytes]:
        """(text that `raw` is whatever follows, bytes that may still become a character)."""
        text = ""
        while raw:
            try:
                return text + raw.decode(), b""
            except UnicodeDecodeError as error:
                text += raw[: error.start].decode()
                if error.reason == "unexpected end of data":
                    return text, raw[error.start :]
                text += self._marks(error.end - error.start)
                raw = raw[error.end :]
        return text, b""

    def _broken(self) -> str:
        count, self._pending = len(self._pending), b""
        return self._marks(count) if count else ""

    def _marks(self, count: int) -> str:
        """U+FFFD for `count` broken bytes: one in all, of byte tokens one for each, as the decoders have it."""
        return "\ufffd" * (1 if self._tokenizer.is_byte_level else count)


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple. Raises ValueError for an empty one, which would stop at once."""
    strings = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop={strings!r}: stop strings must be text of at least one character")
    return strings


def begun(text: str, strings: Iterable[str]) -> int:
    """Characters at the end of `text` that may begin one of the strings."""
    return max(
        (n for s in strings for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0
    )


class StopStrings:
    """Looks for stop strings in a text, also where these span several of its pieces.

    Of several, the one that is complete first ends the text, and of those complete together the longest, however the
    text is cut. What may be the beginning of one is held back until it is decided.

    Args:
        include: the stop string itself belongs to the text.

    Attributes:
        ended: whether a stop string came.
        read: characters, held ones included; if it ended, up to the end of the stop string.
    """

    def __init__(self, stop: Sequence[str] = (), include: bool = False):
        self._stop, self._include = stop, include
        self._held = ""
        self.ended, self.read = False, 0

    def push(self, piece: str) -> str:
        """Text to show after this piece more."""
        if self.ended:
            return ""
        text = self._held + piece
        found = [(text.find(s) + len(s), -len(s)) for s in self._stop if s in text]
        if found:
            end, length = min(found)
            self.ended, self.read, self._held = True, self.read + end - len(self._held), ""
            return text[: end if self._include else end + length]
        self.read += len(piece)
        free = len(text) - begun(text, self._stop)
        self._held = text[free:]
        return text[:free]

    def flush(self) -> str:
        """What is held back, where no stop string can go on."""
        text, self._held = self._held, ""
        return text

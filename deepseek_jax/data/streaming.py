"""`StreamDecoder` turns ids into text one at a time, and returns each character as soon as it is certain."""

from collections.abc import Sequence

from deepseek_jax.data.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes ids one at a time; a character split over several ids comes out once, when it is whole.

    Bytes that can no longer become a character come out at once, as U+FFFD; only what may still become one is held
    back. All parts together are what `Tokenizer.decode` gives, except where byte tokens ("<0xE6>") mix whole and
    broken characters: there it gives up the whole ones, too.

    Args:
        skip_special: leave out special tokens, as in `Tokenizer.decode`.
        before: the ids that the text goes on from, as in `Tokenizer.text_after`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False, before: Sequence[int] = ()):
        self._tokenizer, self._skip = tokenizer, skip_special
        self._pending = b""
        # The id before, on which the text of the next may depend.
        self._before = [i for i in before if not (skip_special and tokenizer.is_special(i))][-1:]

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often "" inside a multi-byte character."""
        token_id = int(token_id)
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

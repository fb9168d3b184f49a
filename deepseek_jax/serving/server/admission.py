"""How much may wait: sequences, and tokens of their prompts. What comes on top is answered 429 at once."""

import time

from deepseek_jax.checks import require
from deepseek_jax.serving.request import QueueFullError

_RATES = 0.9  # of the average time between two starts, what the past keeps
_SHORTEST, _LONGEST = 0.5, 60.0  # seconds


class Admission:
    """Counts the sequences that have no token yet.

    Args:
        sequences: that may wait.
        tokens: of their prompts, together.
    """

    def __init__(self, sequences: int, tokens: int):
        self.sequences, self.tokens = sequences, tokens
        self.waiting, self.waiting_tokens = 0, 0
        self._seconds, self._last = 0.0, time.monotonic()  # per start, and when the last one was

    def enter(self, sequences: int, tokens: int) -> None:
        """All sequences of a request, or none. Raises QueueFullError; ValueError for more than there is room for ever."""
        require(
            sequences <= self.sequences,
            f"{sequences} sequences of one request, its prompts times n, are more than the {self.sequences} that may run and "
            "wait: send fewer at once",
        )
        full = self.waiting + sequences > self.sequences
        # one prompt alone always fits: the engine says what it can hold
        if full or (self.waiting and self.waiting_tokens + tokens > self.tokens):
            raise QueueFullError(
                f"the queue is full: {self.waiting} sequences with {self.waiting_tokens} prompt tokens wait "
                f"(at most {self.sequences} and {self.tokens}); try again later",
                self.retry_after(),
            )
        self.waiting, self.waiting_tokens = self.waiting + sequences, self.waiting_tokens + tokens

    def leave(self, tokens: int, started: bool) -> None:
        """A sequence got its first token, or ended without one."""
        self.waiting, self.waiting_tokens = self.waiting - 1, self.waiting_tokens - tokens
        if started:
            now = time.monotonic()
            self._seconds = _RATES * self._seconds + (1 - _RATES) * (now - self._last)
            self._last = now

    def retry_after(self) -> float:
        """Seconds in which half of what waits starts, at the pace of late."""
        return min(max(_SHORTEST, self._seconds * self.waiting / 2), _LONGEST)

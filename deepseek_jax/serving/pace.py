"""How long programs take: as they took when they were warmed up, then as the engine's turns show."""

from collections.abc import Hashable, Mapping

SLOWER = 1 / 16  # how much a turn that takes longer changes what is known


class Pace:
    """Seconds of programs by their names: ("decode", rows), ("drafts", rows), ("prefill", rows, tokens); and what a token before
    a chunk adds to the last: ("prefix", rows, tokens).

    Others' work on the machine, and compiling, only add to a time: a shorter one is believed, and a longer one changes what is
    known a little.
    """

    def __init__(self, seconds: Mapping[Hashable, float] | None = None):
        self._seconds = dict(seconds or {})

    def __setitem__(self, program: Hashable, seconds: float) -> None:
        self._seconds[program] = seconds

    def of(self, *program: Hashable) -> float | None:
        """None: the program has not run yet."""
        return self._seconds.get(program)

    def chunks(self, rows: int, tokens: int, before: int) -> float:
        """Of a program of chunks, one of which has so many tokens before it."""
        known = self._seconds.get(("prefill", rows, tokens), 0.0)
        return known + before * self._seconds.get(("prefix", rows, tokens), 0.0)

    def took(self, program: Hashable, seconds: float) -> None:
        """A turn of this program alone took so long."""
        known = self._seconds.get(program, seconds)
        longer = known + SLOWER * (min(seconds, 2 * known) - known)
        self._seconds[program] = min(seconds, longer)

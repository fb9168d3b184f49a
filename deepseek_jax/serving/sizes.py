"""The sizes for which programs are compiled, all of them when a server starts. No other one is ever launched."""

import bisect
import dataclasses
import functools

from deepseek_jax.model.cache import PAGE
from deepseek_jax.model.platform import on_cpu

SMALLEST_CHUNK = 16
ROWS_OF_CHUNKS = 8  # prompts in one program, at most
MOVED = 8  # pages; of DeepSeek-V3 in BF16 37 MB, which cross a link of 50 GB/s in 0.7 ms


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one device.

    Attributes:
        slots: sequences that run at the same time.
        max_model_len: tokens of a sequence.
        chunk: tokens of prompts in one program.
        fixed: one size for decode rows, and one of a page for chunks, so that a row's arithmetic is the same whatever
            runs beside it.
        overlap: over a mesh, from how many tokens of a program on it has its rows in two halves (`over_mesh.py`); None: never.
    """

    slots: int
    max_model_len: int
    chunk: int
    fixed: bool = False
    overlap: int | None = None

    @property
    def pages_each(self) -> int:
        return -(-self.max_model_len // PAGE)

    @property
    def moved(self) -> int:
        """Pages that go to another server, or come from one, in one program."""
        return min(MOVED, max(2, self.pages_each))

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """Decode rows: powers of two, up to all slots."""
        if self.fixed:
            return (self.slots,)
        return (*(1 << i for i in range((self.slots - 1).bit_length())), self.slots)

    @functools.cached_property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """(prompts, tokens of each): 16, 64, 256, ... tokens, of one prompt or of as many as a program takes. On a CPU 16, 32,
        64, ...: time goes with the tokens there, and several prompts save some with the fewest alone."""
        if self.fixed:
            return ((1, PAGE),)
        tokens, sizes, cpu = min(SMALLEST_CHUNK, self.chunk), [], on_cpu()
        while tokens < self.chunk:
            most = min(ROWS_OF_CHUNKS, self.chunk // tokens, self.slots)
            several = most > 1 and (not cpu or tokens == SMALLEST_CHUNK)
            sizes += [(1, tokens)] + [(most, tokens)] * several
            tokens *= 2 if cpu else 4
        return (*sizes, (1, self.chunk))

    def rows_for(self, n: int) -> int:
        return self.rows[bisect.bisect_left(self.rows, n)]

    def tokens_for(self, n: int) -> int:
        """Tokens of a chunk of n."""
        return min(tokens for _, tokens in self.chunks if tokens >= n)

    def prompts_for(self, n: int, tokens: int) -> int:
        """Rows of a program for n chunks, or for the most that one takes."""
        sizes = [rows for rows, size in self.chunks if size == tokens]
        return next((rows for rows in sizes if rows >= n), sizes[-1])

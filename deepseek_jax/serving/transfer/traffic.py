"""What travelled between servers, and how fast."""

import collections
import dataclasses

DIRECT, SOCKET = "direct", "socket"  # by `jax.experimental.transfer`, or as bytes of the connection


@dataclasses.dataclass
class Traffic:
    """Counts since the start, of an engine that sends pages or gets them; any thread may read them.

    Attributes:
        requests: whose prompts came, or went, whole.
        failed: those that did not, by the error's code (`errors.py`), or "cancelled".
        pages: that travelled. moved: bytes, seconds: in which they did, by the way that they took.
    """

    requests: int = 0
    pages: int = 0
    failed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    moved: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {DIRECT: 0.0, SOCKET: 0.0})

    def add(self, way: str, pages: int, size: int, seconds: float) -> None:
        self.pages += pages
        self.moved[way] += size
        self.seconds[way] += seconds

    def ends(self) -> dict[str, float]:
        """Requests by how they ended."""
        return {"whole": self.requests, **self.failed}

    def rates(self) -> dict[str, float]:
        """MB/s, by the way."""
        return {way: size / max(1e-9, self.seconds[way]) / 1e6 for way, size in self.moved.items()}

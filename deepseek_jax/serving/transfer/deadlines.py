"""How long each state of a transfer may last."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from deepseek_jax.checks import ranges
from deepseek_jax.serving.transfer.errors import PrefillLostError


@dataclasses.dataclass(frozen=True)
class Deadlines:
    """Seconds.

    Attributes:
        meet: until the servers know each other.
        queued: then, until the first pages come, or nothing is left to come.
        transfer: then, until all have come.
        beat: a side that has nothing to say says so as often; one that says nothing for `misses` of these is dead.
        direct: a pull of `jax.experimental.transfer`; what does not answer is left alone, and bytes go by the connection.
    """

    meet: float = 10.0
    queued: float = 300.0
    transfer: float = 300.0
    beat: float = 5.0
    misses: int = 2
    direct: float = 5.0

    def __post_init__(self):
        ranges("deadlines", self, "meet queued transfer beat direct", 0.01, 86400)
        ranges("deadlines", self, "misses", 1, 1000)

    @property
    def silence(self) -> float:
        return self.beat * self.misses


@contextlib.asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Raises PrefillLostError where the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise PrefillLostError(f"it took more than {seconds:g} s") from error

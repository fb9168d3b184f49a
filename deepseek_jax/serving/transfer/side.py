"""What both sides have: an engine, and what they tell each other of it."""

import logging
import time
from typing import Any

import numpy as np

from deepseek_jax.serving.thread import EngineThread
from deepseek_jax.serving.transfer.deadlines import Deadlines
from deepseek_jax.serving.transfer.direct import Directs
from deepseek_jax.serving.transfer.errors import PrefillDiffersError
from deepseek_jax.serving.transfer.identity import Identity, identity_of
from deepseek_jax.serving.transfer.traffic import Traffic

LOGGER = logging.getLogger("deepseek_jax.serving.transfer")


class Side:
    """A side of transfers.

    Attributes:
        thread: of its engine.
        block: shape and dtype of pages on their way; moved: how many they are at most; page: bytes of one.
        directs: by which arrays travel without a connection; None: by none.
    """

    def __init__(self, thread: EngineThread, weights: str, deadlines: Deadlines, direct: bool):
        device = thread.engine.device
        self.thread, self.deadlines, self._weights = thread, deadlines, weights
        self.block, self.moved = device.block, device.sizes.moved
        self.page = int(np.prod(self.block.shape[1:])) * self.block.dtype.itemsize
        self.directs = Directs(device.place(0)) if direct else None

    @property
    def engine(self) -> Any:
        return self.thread.engine

    @property
    def traffic(self) -> Traffic:
        return self.thread.engine.traffic

    @property
    def identity(self) -> Identity:
        """As the engine's weights are now."""
        return identity_of(self.engine, self._weights)

    def check(self, theirs: Any) -> None:
        """Raises PrefillDiffersError for another side that has not the same. theirs: an object that it sent."""
        differs = self.identity.differences(theirs)
        if differs:
            raise PrefillDiffersError(f"the servers do not match: {differs}")

    def ended(self, what: str, fields: dict[str, Any], began: float, code: str | None, error: object) -> None:
        """Counts a request, and writes its line. code: why it did not come to its end."""
        fields |= {"ms": round(1000 * (time.monotonic() - began), 1)}
        if code is None:
            self.traffic.requests += 1
        else:
            self.traffic.failed[code] += 1
            fields |= {"code": code, "error": str(error)}
        quiet = code in (None, "cancelled")
        LOGGER.log(logging.INFO if quiet else logging.WARNING, what, extra={"fields": fields})

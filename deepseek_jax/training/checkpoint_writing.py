"""What orbax is told about the checkpoints of a run: how arrays are written, and which checkpoints stay."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_SLICE_BYTES = 1 << 22


@dataclasses.dataclass
class Kept:
    """Which checkpoints stay: the newest, every so many steps, the best (orbax's `PreservationPolicy`)."""

    newest: int
    every: int
    best: int
    losses: dict[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        ranked = sorted((loss, step) for step in steps if (loss := self.losses.get(step)) is not None)
        stay = {*steps[-self.newest :], *(step for _, step in ranked[: self.best])}
        stay |= {step for step in steps if self.every and step % self.every == 0}
        return [checkpoint.step in stay for checkpoint in checkpoints]


class Arrays(ocp.PyTreeCheckpointHandler):
    """Writes arrays, and calls `digest` when this process's files are written, in the thread that waits for them.

    Devices that hold copies of an array write a slice each, but not of small arrays: each slice is a program to
    compile; for the many small arrays of a layer that takes longer than writing them.
    """

    def __init__(self, digest: Callable[[], None]):
        types = ocp.type_handlers
        arrays = types.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE_BYTES)
        registry = types.create_type_handler_registry(
            (np.number, types.ScalarHandler()), (np.ndarray, types.NumpyHandler()), (jax.Array, arrays)
        )
        super().__init__(type_handler_registry=registry)
        self._digest = digest

    async def async_save(self, *args: Any, **kwargs: Any) -> Any:
        futures = await super().async_save(*args, **kwargs)
        return [ocp.future.ChainedFuture(futures or [], self._digest)]


@ocp.args.register_with_handler(Arrays, for_save=True, for_restore=True)
@dataclasses.dataclass
class SaveArrays(ocp.args.PyTreeSave):
    """How orbax finds `Arrays`."""

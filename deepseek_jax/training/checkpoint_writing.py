"""What orbax is told about the checkpoints of a run: how arrays are written, and which checkpoints stay."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from deepseek_jax.checkpoints import inventory
from deepseek_jax.checkpoints.files import ITEMS, TMP, first_line, steps_in
from deepseek_jax.parallel.processes.together import is_first

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


class Writer:
    """Writes steps into one directory, in the background; a step gets its name when its files are written and listed.

    What the storage libraries raise becomes one OSError.
    """

    def __init__(self, directory: Path, kept: Kept):
        self._directory, self._step = directory, -1  # which is written, or was last
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_inventory),
        )
        arrays = {item: Arrays(functools.partial(self._digest_own, item)) for item in ("state", "ema")}
        handlers = {**arrays, "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, ema: Any, meta: Mapping[str, Any]) -> None:
        """Returns once the arrays are copied."""
        self._step = step
        items = ocp.args.Composite(
            state=SaveArrays(state), ema=SaveArrays(ema), meta=ocp.args.JsonSave(dict(meta))
        )
        with self._one_error():
            self._manager.save(step, args=items)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._one_error():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def delete(self, step: int) -> None:
        self._manager.delete(step)

    def close(self) -> None:
        """Waits, then releases the manager's threads."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _one_error(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of what other processes do
            raise
        except Exception as error:
            whole = [s for s in steps_in(self._directory) if s != self._step]
            last = f"the last whole one is step {max(whole)}" if whole else "there is no older one"
            raise OSError(
                f"the checkpoint of step {self._step} could not be written to {self._directory}: "
                f"{first_line(error)}; {last}"
            ) from error

    def _unfinished(self) -> Iterator[Path]:
        return self._directory.glob(f"{self._step}{TMP}")

    def _digest_own(self, item: str) -> None:
        """Called by orbax's thread on each process when its files of `item` are written."""
        process = jax.process_index()
        for path in self._unfinished():
            inventory.write_part(path, f"{item}.{process}", path / item / f"ocdbt.process_{process}")

    def _write_inventory(self) -> None:
        """Called by orbax's thread when all files are written, before the step gets its final name."""
        if is_first():
            for path in self._unfinished():
                inventory.write(path, ITEMS)

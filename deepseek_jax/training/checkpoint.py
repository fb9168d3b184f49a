"""Checkpoints: written asynchronously by orbax, whole or absent, restored onto any sharding.

Layout: `<directory>/<step>/{state,ema,meta}`: the TrainState, the host-side average, and JSON with the config,
the state of the data stream, the token count and `format`. A step is written under a temporary name and renamed
when complete, so a kill at any moment leaves the previous steps and at most one temporary folder, which the next
`Checkpointer` on that directory removes. `<step>/files.json` lists every file with its size, so truncation is seen
before anything is read. No pickle anywhere.

Of several processes, each writes and reads its own shards, in a directory that all of them share; what is in it is
decided by the first, since file systems do not show the same thing to all hosts at the same time.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from deepseek_jax.parallel.together import from_first, is_first
from deepseek_jax.training.checkpoint_files import (
    FORMAT,
    INVENTORY,
    META_KEYS,
    TMP,
    CheckpointError,
    PyTree,
    check_model,
    choose,
    file_sizes,
    guarded,
    offering_older,
    read_meta,
    read_state,
    read_tree,
    steps_in,
)

_SLICE_BYTES = 1 << 22


class Restored(NamedTuple):
    """What `Checkpointer.restore` gives back; `meta` as it was saved, `ema` in host memory or as asked for."""

    step: int
    state: PyTree
    ema: PyTree
    meta: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run.

    Args:
        directory: created if missing. All processes of a run must see the same one.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(self, directory: str | Path, keep: int = 3):
        self.directory = Path(directory).absolute()
        if is_first():
            for leftover in self.directory.glob(f"*{TMP}"):  # of a killed run, as large as a checkpoint
                shutil.rmtree(leftover)
        self._saving = -1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_inventory),
        )
        handlers = {"state": _array_handler(), "ema": _array_handler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def save(self, step: int, state: PyTree, ema: PyTree, meta: Mapping[str, Any]) -> bool:
        """Starts writing a checkpoint and returns once the arrays are copied, so `state` may be donated.

        Args:
            step: steps taken so far.
            state, ema: trees of arrays. NumPy arrays must not change until `wait`.
            meta: JSON-serialisable; has at least "config", "data" (stream state) and "tokens" (int).

        Returns:
            False if this step is there already (nothing is written).

        Raises:
            ValueError: keys missing in `meta`, or newer steps in the directory, which `restore(step=...)` of
                an older one would have removed. An earlier write that failed raises here or in `wait`.
        """
        missing = [key for key in META_KEYS if key not in meta]
        if missing:
            raise ValueError(f"checkpoint metadata lacks {missing}; it needs {list(META_KEYS)}")
        self.wait()
        latest = self.latest()
        if latest == step:
            return False
        if latest is not None and step < latest:
            raise ValueError(
                f"{self.directory} holds step {latest}, newer than step {step} to be saved: resume from it, "
                f"restore an older step explicitly, or use another directory"
            )
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                ema=ocp.args.PyTreeSave(ema),
                meta=ocp.args.JsonSave({**meta, "format": FORMAT, "step": step}),
            ),
        )
        return True

    def restore(
        self,
        abstract: PyTree,
        step: int | None = None,
        model: Mapping[str, Any] | None = None,
        ema: PyTree | None = None,
    ) -> Restored:
        """Reads one checkpoint whole.

        Args:
            abstract: tree like the saved state with shape, dtype and sharding (`jax.ShapeDtypeStruct`, arrays);
                the sharding need not be the saved one. Leaves without sharding go to the default device.
            step: which; None for the newest. An older step than the newest becomes the newest: the steps after
                it are removed, because the run goes another way from here.
            model: the run's model config as a dict, compared with the saved one.
            ema: tree like the saved average, of `jax.ShapeDtypeStruct`: leaves with a sharding are read onto it,
                the others into NumPy arrays. None: all into NumPy arrays.

        Raises:
            CheckpointError (a ValueError): no checkpoint, truncated, foreign, or of another model; names the
                path, the cause and, where there is one, an older step that can be read.
        """
        steps = self.steps()
        newest = self.latest()
        step = newest if step is None else step
        if step == newest and step is not None and step not in steps:
            raise CheckpointError(
                f"process {jax.process_index()} does not see step {step} in {self.directory}, which process 0 does: "
                f"put train.out_dir on a file system that all hosts share"
            )
        step = choose(self.directory, steps, step)
        restored = self._read_or_offer(step, abstract, model, ema)
        newer = [s for s in steps if s > step]
        for other in newer:
            self._manager.delete(other)
        return restored

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None; the same on all processes, which must all call it."""
        step = from_first(max(self.steps(), default=-1))
        return None if step < 0 else step

    def steps(self) -> list[int]:
        """Steps in the directory, ascending; one still being written is not among them.

        All but the oldest are whole: a kill while old steps are removed can leave one of these in part.
        """
        return steps_in(self.directory)

    def wait(self) -> None:
        """Returns when everything is on disk; raises what a write raised."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, then releases the manager's threads."""
        self.wait()
        self._manager.close()

    def _write_inventory(self) -> None:
        """Called by orbax's thread when all files are written, before the step gets its final name."""
        if is_first():
            for path in self.directory.glob(f"{self._saving}{TMP}"):
                (path / INVENTORY).write_text(json.dumps(file_sizes(path)))

    def _read_or_offer(
        self, step: int, abstract: PyTree, model: Mapping[str, Any] | None, ema: PyTree | None
    ) -> Restored:
        def read(step: int) -> Restored:
            path = self.directory / str(step)
            meta = read_meta(path)
            if model is not None:
                check_model(path, meta["config"], model)
            state = guarded(path, lambda: read_state(path / "state", abstract))
            return Restored(step, state, guarded(path, lambda: read_tree(path / "ema", like=ema)), meta)

        return offering_older(step, self.steps(), read)


def load_params(
    directory: str | Path, step: int | None = None, ema: bool = False
) -> tuple[dict[str, Any], PyTree, np.ndarray, dict[str, Any]]:
    """Parameters of a run for generation, without optimizer state; a run may go on writing meanwhile.

    Args:
        directory: the run's checkpoints.
        step: which; None for the newest.
        ema: the average of the parameters instead of the last ones.

    Returns:
        (config of the run as a dict, params in host memory, balance_bias float32 [layer, expert], metadata).

    Raises:
        CheckpointError (a ValueError): as `Checkpointer.restore`.
    """
    directory = Path(directory).absolute()
    steps = steps_in(directory)

    def read(step: int) -> tuple[dict[str, Any], PyTree, np.ndarray, dict[str, Any]]:
        path = directory / str(step)
        meta = read_meta(path)
        names = ("balance_bias",) if ema else ("balance_bias", "params")
        tree = guarded(path, lambda: read_tree(path / "state", names))
        source = guarded(path, lambda: read_tree(path / "ema", ("params",))) if ema else tree
        return meta["config"], source["params"], tree["balance_bias"], meta

    return offering_older(choose(directory, steps, step), steps, read)


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """Devices that hold copies of an array write a slice each, but not of small arrays.

    Each slice is a program to compile; for the many small arrays of a layer that takes longer than writing them.
    """
    types = ocp.type_handlers
    arrays = types.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE_BYTES)
    registry = types.create_type_handler_registry(
        (np.number, types.ScalarHandler()), (np.ndarray, types.NumpyHandler()), (jax.Array, arrays)
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)

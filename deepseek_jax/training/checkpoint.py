"""Checkpoints: written asynchronously by orbax, whole or absent, restored onto any sharding.

Layout: `<directory>/<step>/{state,ema,meta}`: the TrainState, the host-side average, and JSON with the config,
the state of the data stream, the token count and `format`. A step is written under a temporary name and renamed
when complete, so a kill at any moment leaves the previous steps and at most one temporary folder, which the next
`Checkpointer` on that directory removes. `<step>/files.json` lists every file with its size and SHA-256, so that a
single bit which changed is seen before anything is used. No pickle anywhere.

A checkpoint is good: a state with NaN or infinity is not written, since nobody could go on from it.

Of several processes, each writes, digests and reads its own shards, in a directory that all of them share; what is in
it is decided by the first, since file systems do not show the same thing to all hosts at the same time.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deepseek_jax.checkpoints.arrays import PyTree, read_state, read_tree
from deepseek_jax.checkpoints.files import (
    FORMAT,
    META_KEYS,
    TMP,
    CheckpointError,
    check_model,
    choose,
    guarded,
    offering_older,
    read_meta,
    steps_in,
    verify,
    wrong_values,
)
from deepseek_jax.checks import listed
from deepseek_jax.parallel.processes.together import from_first, is_first
from deepseek_jax.training.checkpoint_writing import Kept, Writer
from deepseek_jax.training.finite import NonFiniteError, not_finite

_MAX_NAMED = 3  # arrays listed in an error


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
        keep_every: besides, those whose step is a multiple of this; 0: none.
        keep_best: besides, so many of those with the smallest "validation_loss" in their metadata.
    """

    def __init__(self, directory: str | Path, keep: int = 3, keep_every: int = 0, keep_best: int = 0):
        self.directory = Path(directory).absolute()
        if is_first():
            for leftover in self.directory.glob(f"*{TMP}"):  # of a killed run, as large as a checkpoint
                shutil.rmtree(leftover)
        self._kept = Kept(keep, keep_every, keep_best, {s: self._loss(s) for s in self.steps()})
        self._writer = Writer(self.directory, self._kept)

    def save(self, step: int, state: PyTree, ema: PyTree, meta: Mapping[str, Any]) -> bool:
        """Starts writing a checkpoint and returns once the arrays are copied, so `state` may be donated.

        Args:
            step: steps taken so far.
            state, ema: trees of arrays. NumPy arrays must not change until `wait`. Those of `ema` are finite, as an
                `EMA` keeps them: arrays in host memory are not looked through.
            meta: JSON-serialisable; has at least "config", "data" (stream state) and "tokens" (int); and
                "validation_loss" (a number or None) where the best are kept.

        Returns:
            False if this step is there already (nothing is written).

        Raises:
            NonFiniteError: `state` holds NaN or infinity; names the arrays and the last checkpoint. Nothing is written.
            ValueError: wrong `meta`, or newer steps in the directory, which `discard_newer` would remove.
            OSError: this write, or the one before, which ends in the background, failed.
        """
        missing = [key for key in META_KEYS if key not in meta]
        if missing:
            raise ValueError(f"checkpoint metadata lacks {missing}; it needs {list(META_KEYS)}")
        if (wrong := wrong_values(meta)) is not None:
            raise ValueError(f"checkpoint metadata has {wrong}")
        self.wait()
        latest = self.latest()
        if latest == step:
            return False
        if latest is not None and step < latest:
            raise ValueError(
                f"{self.directory} holds step {latest}, newer than step {step} to be saved: resume from it, "
                f"discard the newer ones explicitly, or use another directory"
            )
        self._require_finite(step, state, latest)
        self._kept.losses[step] = meta.get("validation_loss")
        self._writer.save(step, state, ema, {**meta, "format": FORMAT, "step": step})
        return True

    def restore(
        self,
        abstract: PyTree,
        step: int | None = None,
        model: Mapping[str, Any] | None = None,
        ema: PyTree | None = None,
    ) -> Restored:
        """Reads one checkpoint whole, after comparing every file with what was written.

        Args:
            abstract: tree like the saved state with shape, dtype and sharding (`jax.ShapeDtypeStruct`, arrays);
                the sharding need not be the saved one. Leaves without sharding go to the default device.
            step: which; None for the newest.
            model: the run's model config as a dict, compared with the saved one.
            ema: tree like the saved average, of `jax.ShapeDtypeStruct`: leaves with a sharding are read onto it,
                the others into NumPy arrays. None: all into NumPy arrays.

        Raises:
            CheckpointError (a ValueError): no checkpoint, damaged, with NaN or infinity, foreign, or of another model;
                names the path, the cause and, where there is one, the step before.
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
        return offering_older(step, steps, lambda step: self._read(step, abstract, model, ema))

    def discard_newer(self, step: int) -> None:
        """Removes the checkpoints after `step`: the run goes another way from there. All processes must call it."""
        for newer in [s for s in self.steps() if s > step]:
            self._writer.delete(newer)

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None; the same on all processes, which must all call it."""
        step = from_first(max(self.steps(), default=-1))
        return None if step < 0 else step

    def steps(self) -> list[int]:
        """Steps in the directory, ascending; one still being written is not among them.

        The newest `keep` are whole: a kill while an older one is removed can leave that in part.
        """
        return steps_in(self.directory)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises OSError if a write failed."""
        self._writer.wait()

    def close(self) -> None:
        """Waits, then releases the threads that write."""
        self._writer.close()

    def _require_finite(self, step: int, state: PyTree, latest: int | None) -> None:
        if bad := not_finite(state):
            last = "no checkpoint came before"
            if latest is not None:
                last = f"the last good checkpoint is step {latest}"
            raise NonFiniteError(
                f"step {step} is not saved: NaN or infinity in {listed(bad, _MAX_NAMED)}; {last} in {self.directory}"
            )

    def _read(
        self, step: int, abstract: PyTree, model: Mapping[str, Any] | None, ema: PyTree | None
    ) -> Restored:
        path = self.directory / str(step)
        verify(path, together=True)
        meta = read_meta(path)
        if model is not None:
            check_model(path, meta["config"], model)
        state = guarded(path, lambda: read_state(path / "state", abstract, meta["format"]))
        average = guarded(path, lambda: read_tree(path / "ema", like=ema))
        if bad := not_finite(state) + [f"ema.{name}" for name in not_finite(average)]:
            raise CheckpointError(
                f"checkpoint {path} is no good: NaN or infinity in {listed(bad, _MAX_NAMED)}"
            )
        return Restored(step, state, average, meta)

    def _loss(self, step: int) -> float | None:
        """Validation loss of a checkpoint; None where it has none, or where its metadata cannot be read."""
        try:
            return read_meta(self.directory / str(step)).get("validation_loss")
        except CheckpointError:
            return None

"""A training run between its steps: its folder, its data, its state, and the checkpoints that it goes on from."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from deepseek_jax import data as data_lib
from deepseek_jax import now
from deepseek_jax.checkpoints.arrays import PyTree
from deepseek_jax.checkpoints.changes import Changes, config_changes
from deepseek_jax.config import Config, to_dict
from deepseek_jax.parallel.processes.together import is_first
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.ema import EMA, abstract_average
from deepseek_jax.training.evaluation import Evaluation
from deepseek_jax.training.feeding import Feed
from deepseek_jax.training.preflight import check_vocabulary
from deepseek_jax.training.run_lock import RunLock
from deepseek_jax.training.start import Start
from deepseek_jax.training.state import TrainState
from deepseek_jax.training.step import abstract_state, init_state


class Run:
    """Everything that lives as long as a run does. `loop.Trainer` trains it.

    Args:
        cfg: the frozen config. Checkpoints and records go to `cfg.train.out_dir`.
        mesh: the devices.
        data: default: `deepseek_jax.data.load(cfg.data)`, with this process's share of every batch; read when it
            is first asked for.

    Attributes:
        step, tokens: taken and consumed so far.
        changes: how the config differs from that of the checkpoint resumed from.
        differences: how the model's config differs from that of the weights in `train.init_from`.
        provenance: of those weights, see `Start.provenance`; None for a run from random ones.

    Raises:
        ValueError: a folder in which another process trains (`run_lock.py`). OSError: a folder that cannot be written.
    """

    def __init__(self, cfg: Config, mesh: Mesh, data: data_lib.Data | None = None):
        self.cfg, self.mesh, self.feed = cfg, mesh, Feed(mesh)
        self.out_dir = Path(cfg.train.out_dir)
        self.step, self.tokens = 0, 0
        self.changes = Changes([], [])
        self.differences: list[str] = []
        self.provenance: dict[str, Any] | None = None
        self._evaluated: tuple[int, Evaluation] | None = None
        with contextlib.ExitStack() as failing:
            self._lock = self._locked() if is_first() else None
            failing.callback(self._unlock)
            if data is not None:
                self.data = data
            keep = (cfg.train.keep, cfg.train.keep_every, cfg.train.keep_best)
            self.checkpointer = Checkpointer(self.out_dir / "checkpoints", *keep)
            failing.pop_all()

    def _locked(self) -> RunLock:
        try:
            return RunLock(self.out_dir)
        except OSError as error:
            raise OSError(error.errno, f"train.out_dir: {error.strerror}", error.filename) from error

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @functools.cached_property
    def data(self) -> data_lib.Data:
        """Raises ValueError for what cannot be read, or does not fit the model."""
        data = data_lib.load(self.cfg.data, *self.feed.share)
        check_vocabulary(self.cfg, data.tokenizer)
        return data

    @functools.cached_property
    def state(self) -> TrainState:
        """At the present step. A resumed run never makes the first one, which would lie beside the restored."""
        if not self.cfg.train.init_from:
            with now.doing("making the first parameters"):
                return init_state(self.cfg, self.mesh)
        start = Start(self.cfg, self.mesh)
        start.check_tokenizer(self.data.tokenizer)
        self.differences, self.provenance = start.differences, start.provenance
        with now.doing(f"reading the weights of {self.cfg.train.init_from}"):
            return start.read()

    @functools.cached_property
    def ema(self) -> EMA:
        """The average of the parameters so far."""
        return EMA(self.state.params, self.cfg.train.ema_decay)

    def resume(self, step: int | None = None, discard_newer: bool = False) -> bool:
        """Continue from a checkpoint (default: the newest). False if there is none.

        Args:
            step: which. Newer checkpoints are removed, and the records after it when the run goes on, because it goes
                another way from there; only with `discard_newer`.

        Raises CheckpointError if it is damaged or belongs to another model, ValueError if to other data, or if there
        are newer ones and nobody said that they may go.
        """
        latest = self.checkpointer.latest()
        if step is None and latest is None:
            return False
        if step is not None and latest is not None and step < latest and not discard_newer:
            newer = [s for s in self.checkpointer.steps() if s > step]
            raise ValueError(
                f"going on from step {step} would remove the newer checkpoints {newer} in "
                f"{self.checkpointer.directory} and the records after it: say so with --discard_newer "
                f"(discard_newer=True), or copy the folder {step} to the checkpoints/ of another train.out_dir"
            )
        model = to_dict(self.cfg)["model"]
        wanted = abstract_state(self.cfg, self.mesh)
        restored = self.checkpointer.restore(wanted, step, model, self.abstract_beside(wanted.params))
        self.data.train.restore(restored.meta["data"])
        self.state, self.step, self.tokens = restored.state, restored.step, restored.meta["tokens"]
        self.take_beside(restored.ema)
        self.provenance = restored.meta.get("provenance")
        self.changes = config_changes(restored.meta["config"], self.cfg)
        self.checkpointer.discard_newer(self.step)
        return True

    def save(self) -> None:
        """Start writing a checkpoint of the present step; the write goes on in the background.

        Raises NonFiniteError if the state is not finite, OSError if it, or the one before, cannot be written, or if
        the folder is gone or another's by now.
        """
        if self._lock is not None:
            self._lock.check()
        meta = {
            "config": to_dict(self.cfg),
            "data": self.data_state(),
            "tokens": self.tokens,
            "validation_loss": self._validation_loss(),
            **({} if self.provenance is None else {"provenance": self.provenance}),
        }
        self.checkpointer.save(self.step, self.state, self.beside(), meta)

    def data_state(self) -> Any:
        """Where the data go on after a checkpoint."""
        return self.data.train.state()

    # What a checkpoint keeps beside the state: the average of the parameters.

    def beside(self) -> PyTree:
        return self.ema.state()

    def abstract_beside(self, params: PyTree) -> PyTree:
        """Of abstract parameters: `beside` as `Checkpointer.restore` is asked for it."""
        return abstract_average(params)

    def take_beside(self, restored: PyTree) -> None:
        self.ema = EMA(restored["params"], self.cfg.train.ema_decay, restored["updates"])

    def _validation_loss(self) -> float | None:
        """Of the parameters as they are now; None where they were not evaluated."""
        if self._evaluated is None or self._evaluated[0] != self.step:
            return None
        loss = self._evaluated[1].loss
        return loss if np.isfinite(loss) else None

    def close(self) -> None:
        """Finish pending writes, stop the threads, give the folder free. Raises OSError if a write failed."""
        with contextlib.ExitStack() as whatever_fails:
            whatever_fails.callback(self._unlock)
            if "data" in vars(self):
                whatever_fails.callback(self.data.train.close)
            if "ema" in vars(self):
                whatever_fails.callback(self.ema.close)
            self.checkpointer.close()

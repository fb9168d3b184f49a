"""The training loop: data, schedules, steps, evaluation, checkpoints, records.

The host runs one step ahead of what it reads: the metrics of step n - 1 are fetched after step n is dispatched,
so nothing in the loop waits for the device. A run is a function of its config: resumed from any checkpoint it
goes on bitwise as if it had never stopped (state, average, data position and token count are all restored): on CPUs,
and on GPUs with `train.deterministic`, on the same number of devices and with the same versions.

Several processes run the same loop, each on its rows of every batch; they stop and save at the same step.
"""

import contextlib
import functools
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax import data as data_lib
from deepseek_jax import now
from deepseek_jax.checkpoints.changes import Changes, config_changes
from deepseek_jax.config import Config, to_dict
from deepseek_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh
from deepseek_jax.parallel.processes.together import StopVote, batch_share, is_first, on_host
from deepseek_jax.training.boards import wandb_for
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.ema import EMA, abstract_average
from deepseek_jax.training.finite import NonFiniteError
from deepseek_jax.training.preflight import (
    check_tokenizer,
    check_vocabulary,
    granularity,
    in_background,
    trace_step,
)
from deepseek_jax.training.profiling import StepProfile
from deepseek_jax.training.records import Evaluation, Records
from deepseek_jax.training.run_lock import RunLock
from deepseek_jax.training.schedules import Schedules, StepPlan
from deepseek_jax.training.start import Average, Start
from deepseek_jax.training.state import TrainState
from deepseek_jax.training.step import abstract_state, init_state, make_eval_step, make_train_step
from deepseek_jax.training.stopping import stop_on_signals

__all__ = ["Evaluation", "NonFiniteError", "Result", "Trainer", "stop_on_signals"]


class Result(NamedTuple):
    """Of a run that ended: at its last step, or earlier if it was told to stop (`stopped`)."""

    state: TrainState
    step: int
    tokens: int
    stopped: bool
    evaluation: Evaluation | None
    ema_evaluation: Evaluation | None


class Trainer:
    """One run: everything that lives as long as it does.

    Args:
        cfg: the frozen config. Checkpoints and records go to `cfg.train.out_dir`.
        mesh: default: all devices, by `cfg.mesh`.
        data: default: `deepseek_jax.data.load(cfg.data)`, with this process's share of every batch; read when it
            is first asked for.

    Raises:
        ValueError: batch, mesh and accumulation do not divide; a folder in which another process trains
            (`run_lock.py`). OSError: a folder that cannot be written. `check` and `data` find the rest.
    """

    def __init__(self, cfg: Config, mesh: Mesh | None = None, data: data_lib.Data | None = None):
        self.cfg = cfg
        self.mesh = make_mesh(cfg.mesh) if mesh is None else mesh
        self.out_dir = Path(cfg.train.out_dir)
        self.granularity = granularity(cfg, self.mesh)
        self.schedules = Schedules.of_steps(cfg.optimizer, cfg.train, cfg.data.seq_len, self.granularity)
        self.total_steps = self.schedules.num_steps(self.granularity)
        self.step_fn: Any = make_train_step(cfg, self.mesh)
        self.eval_fn = make_eval_step(cfg, self.mesh)
        self.step, self.tokens = 0, 0
        self.changes = Changes([], [])
        self.differences: list[str] = []  # of the weights' config, where the run starts from given ones
        self._evaluated: tuple[int, Evaluation] | None = None
        self._average: Average | None = None  # to go on with
        self.records: Records | None = None  # of `run`; takes more until `close`
        self._vote = StopVote(self.mesh)
        self._compiled: Future | None = None
        self._share = batch_share(self.mesh)
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
        data = data_lib.load(self.cfg.data, *self._share)
        check_vocabulary(self.cfg, data.tokenizer)
        return data

    # --- the step before it runs --------------------------------------------------------------------------

    @functools.cached_property
    def _traced(self) -> Any:
        """The step for a whole batch."""
        return trace_step(self.step_fn, self.cfg, self.mesh, self.schedules)

    def check(self) -> None:
        """Raises ValueError for whatever of the config cannot be computed, in seconds: it traces a step.

        Nothing has been read or compiled then.
        """
        with now.doing("checking the config"):
            check_tokenizer(self.cfg)
            if self.cfg.train.wandb and is_first():
                wandb_for(self.cfg.train.wandb)
            if self.cfg.train.init_from and self.checkpointer.latest() is None:
                Start(self.cfg, self.mesh)
            _ = self._traced

    def compile(self) -> None:
        """Begins to compile the step, in a thread, while the data are read; `run` waits for it."""
        self._compiled = in_background(self._traced.lower().compile)
        if jax.process_count() > 1:  # which compile their programs in the same order
            self._compiled.result()

    def _wait_for_step(self) -> None:
        if self._compiled is None and self.step < self.total_steps:
            self.compile()
        if self._compiled is not None:
            with now.doing("compiling the training step"):
                self._compiled.result()

    # --- state --------------------------------------------------------------------------------------------

    @functools.cached_property
    def state(self) -> TrainState:
        """At the present step. A resumed run never makes the first one, which would lie beside the restored."""
        if not self.cfg.train.init_from:
            with now.doing("making the first parameters"):
                return init_state(self.cfg, self.mesh)
        start = Start(self.cfg, self.mesh)
        start.check_tokenizer(self.data.tokenizer)
        self.differences = start.differences
        with now.doing(f"reading the weights of {self.cfg.train.init_from}"):
            state, self._average = start.read()
        return state

    @functools.cached_property
    def ema(self) -> EMA:
        """The average of the parameters so far."""
        params = self.state.params
        average = self._average or Average(params, 0)
        return EMA(average.params, self.cfg.train.ema_decay, average.updates)

    def resume(self, step: int | None = None, discard_newer: bool = False) -> bool:
        """Continue from a checkpoint (default: the newest). False if there is none.

        Args:
            step: which. Newer checkpoints are removed, and the records after it when the run goes on, because it goes
                another way from there; only with `discard_newer`.

        `changes` says afterwards how the config differs from the checkpoint's.

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
        restored = self.checkpointer.restore(wanted, step, model, abstract_average(wanted.params))
        self.data.train.restore(restored.meta["data"])
        self.state, self.step, self.tokens = restored.state, restored.step, restored.meta["tokens"]
        self.ema = EMA(restored.ema["params"], self.cfg.train.ema_decay, restored.ema["updates"])
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
            "data": self.data.train.state(),
            "tokens": self.tokens,
            "validation_loss": self._validation_loss(),
        }
        self.checkpointer.save(self.step, self.state, self.ema.state(), meta)

    def _validation_loss(self) -> float | None:
        """Of the parameters as they are now; None where they were not evaluated."""
        step, evaluation = self._evaluated or (-1, None)
        finite = evaluation is not None and np.isfinite(evaluation.loss)
        return evaluation.loss if evaluation is not None and finite and step == self.step else None

    def close(self) -> None:
        """Finish pending writes, stop the threads, give the folder free. Raises OSError if a write failed."""
        with contextlib.ExitStack() as whatever_fails:
            whatever_fails.callback(self._unlock)
            if "data" in vars(self):
                whatever_fails.callback(self.data.train.close)
            if "ema" in vars(self):
                whatever_fails.callback(self.ema.close)
            if self.records is not None:
                whatever_fails.callback(self.records.close)
            self.checkpointer.close()

    def nothing_left(self) -> bool:
        """Whether the run is at its end, or beyond it: it has consumed the tokens of all its steps."""
        return next(self.schedules.plan(self.granularity, self.step, self.tokens), None) is None

    # --- running ------------------------------------------------------------------------------------------

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch as global arrays, sharded over the batch axes."""
        sharding = batch_sharding(self.mesh)
        parts = self._share[1]
        return {
            k: jax.make_array_from_process_local_data(sharding, x, (len(x) * parts, *x.shape[1:]))
            for k, x in batch.items()
        }

    def _filled_up(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This process's rows of a batch during the ramp, each device's followed by empty ones up to the full batch."""
        parts = self._share[1]
        devices, room = batch_shards(self.mesh) // parts, self.cfg.train.batch_size // parts

        def one(x: np.ndarray) -> np.ndarray:
            rows = x.reshape(devices, -1, *x.shape[1:])
            empty = room // devices - rows.shape[1]
            return np.pad(rows, ((0, 0), (0, empty), (0, 0))).reshape(room, *x.shape[1:])

        return {name: one(x) for name, x in batch.items()}

    def _my_rows(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        part, parts = self._share
        rows = len(batch["tokens"]) // parts
        return {k: x[part * rows : (part + 1) * rows] for k, x in batch.items()}

    def evaluate(self, params: Any) -> Evaluation:
        """Validation loss of `params` with the present balance bias."""
        with now.doing("evaluating"):
            return self._evaluate(params)

    def _evaluate(self, params: Any) -> Evaluation:
        windows = self.data.validation.subset(self.cfg.train.eval_windows)
        shards = batch_shards(self.mesh)
        size = shards * max(1, 16 // shards)
        nats: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for start in range(0, len(windows), size):
            batch = {k: x[start : start + size] for k, x in windows.batch.items()}
            have = len(batch["tokens"])
            batch = {k: np.pad(x, ((0, size - have), (0, 0)), mode="edge") for k, x in batch.items()}
            out = self.eval_fn(params, self.state.balance_bias, self.put(self._my_rows(batch)))
            for parts, values in zip((nats, labels), out, strict=True):
                parts.append(on_host(values)[:have])
        total, counted = (float(np.concatenate(x).astype(np.float64).sum()) for x in (nats, labels))
        return Evaluation(total / counted, data_lib.bits_per_byte(total, windows.num_bytes))

    @functools.cached_property
    def unigram(self) -> data_lib.UnigramLoss:
        """The unigram model's loss on the windows that `evaluate` takes."""
        return self.data.unigram(self.data.validation.subset(self.cfg.train.eval_windows))

    def run(
        self,
        stop: threading.Event | None = None,
        progress_file: Any = None,
        profile_steps: tuple[int, int] | None = None,
    ) -> Result:
        """Train to the last step, or until `stop` is set; both end with a checkpoint of where it stands.

        Of several processes, it is enough that one is told to stop: all do, after the same step. Of the steps
        `profile_steps` (first, last) a profile is written.

        Raises NonFiniteError after `train.max_bad_steps` skipped steps in a row.
        """
        stop = stop or threading.Event()
        if is_first():
            self.data.tokenizer.save(self.out_dir)
        _ = self.state
        self._wait_for_step()
        latest, devices = self.checkpointer.latest, self.mesh.size
        records = Records(self.cfg, self.step, self.total_steps, devices, latest, progress_file)
        self.records, profile = records, StepProfile(self.out_dir / "profile", profile_steps, records)
        stopped = False
        try:
            for plan in self.schedules.plan(self.granularity, self.step, self.tokens):
                if stopped := self._vote(stop.is_set()):
                    break
                with profile.around(plan.step + 1):
                    self._one_step(plan, records)
            records.flush()
            profile.close(self.step)
            if self.checkpointer.latest() != self.step:
                self.save()
            if stopped:
                return Result(self.state, self.step, self.tokens, True, None, None)
            return self._finish(records)
        finally:
            profile.close(self.step)
            records.end()

    def _one_step(self, plan: StepPlan, records: Records) -> None:
        cfg = self.cfg.train
        hyper = self.schedules.of_step(plan, self.granularity)
        with records.waiting_for_data():
            rows = self.data.train.take(plan.batch_size)
        if hyper.micro_batches is not None:
            rows = self._filled_up(rows)
        batch = self.put(rows)
        self.state, metrics = self.step_fn(self.state, batch, hyper)
        self.step, self.tokens = plan.step + 1, plan.tokens + plan.batch_size * self.cfg.data.seq_len
        records.add(self.step, self.tokens, plan.batch_size, hyper, metrics)
        if self.step % cfg.ema_every == 0:
            self.ema.update(self.state.params, metrics.finite)
        last = self.step == self.total_steps
        saving = last or self.step % cfg.checkpoint_every == 0
        if (not last and self.step % cfg.eval_every == 0) or (saving and cfg.keep_best):
            records.flush()
            self._evaluate_now(records)
        if saving:
            records.flush()
            self.save()
            records.pause()

    def _evaluate_now(self, records: Records) -> Evaluation:
        """Of the present parameters, once per step; written down."""
        if self._evaluated is None or self._evaluated[0] != self.step:
            self._evaluated = self.step, self.evaluate(self.state.params)
            records.evaluation(*self._evaluated, self.unigram.nats_per_token if is_first() else None)
        return self._evaluated[1]

    def _finish(self, records: Records) -> Result:
        evaluation = self._evaluate_now(records)
        ema_evaluation = self.evaluate(self.ema.on_devices(self.state.params))
        with now.doing("saving"):
            self.checkpointer.wait()
        return Result(self.state, self.step, self.tokens, False, evaluation, ema_evaluation)

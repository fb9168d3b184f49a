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
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from deepseek_jax import data as data_lib
from deepseek_jax import now
from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.processes.together import StopVote, is_first
from deepseek_jax.training.boards import wandb_for
from deepseek_jax.training.evaluation import Evaluation, evaluate
from deepseek_jax.training.finite import NonFiniteError
from deepseek_jax.training.passes import make_eval_step
from deepseek_jax.training.preflight import StepProgram, abstract_batch, check_tokenizer, granularity
from deepseek_jax.training.profiling import StepProfile
from deepseek_jax.training.records import Records, Step
from deepseek_jax.training.run import Run
from deepseek_jax.training.schedules import Schedules, StepPlan
from deepseek_jax.training.start import Start
from deepseek_jax.training.state import TrainState
from deepseek_jax.training.step import make_train_step
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


class Trainer(Run):
    """A run, its schedules and its compiled step.

    Arguments and errors are those of `Run`; mesh: all devices by `cfg.mesh`, if None. Raises ValueError for batch, mesh
    and accumulation that do not divide, before the folder is touched.
    """

    def __init__(self, cfg: Config, mesh: Mesh | None = None, data: data_lib.Data | None = None):
        mesh = make_mesh(cfg.mesh) if mesh is None else mesh
        self.granularity = granularity(cfg, mesh)
        self._schedule(cfg)
        self.step_fn: Any = make_train_step(cfg, mesh)
        self.eval_fn = make_eval_step(cfg, mesh)
        self.records: Records | None = None  # of `run`; takes more until `close`
        self._vote, self._averaged = StopVote(mesh), False
        super().__init__(cfg, mesh, data)

    def _schedule(self, cfg: Config) -> None:
        """Makes the schedules of `cfg`."""
        self.schedules = Schedules.of_steps(cfg.optimizer, cfg.train, cfg.data.seq_len, self.granularity)
        self.total_steps = self.schedules.num_steps(self.granularity)

    @functools.cached_property
    def _program(self) -> StepProgram:
        return StepProgram(self.step_fn, self.cfg, self.mesh, self.schedules, self._abstract_batch())

    def _abstract_batch(self) -> dict[str, Any]:
        return abstract_batch(self.cfg, self.mesh)

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
            _ = self._program

    def compile(self) -> None:
        """Begins to compile the step, in a thread, while the data are read; `run` waits for it."""
        self._program.compile()

    def close(self) -> None:
        """As `Run.close`; no records are taken after it."""
        with contextlib.ExitStack() as whatever_fails:
            if self.records is not None:
                whatever_fails.callback(self.records.close)
            super().close()

    def nothing_left(self) -> bool:
        """Whether the run is at its end, or beyond it: it has consumed the tokens of all its steps."""
        return next(self.schedules.plan(self.granularity, self.step, self.tokens), None) is None

    @functools.cached_property
    def _windows(self) -> data_lib.Validation:
        return self.data.validation.subset(self.cfg.train.eval_windows)

    @functools.cached_property
    def unigram(self) -> data_lib.UnigramLoss:
        """The unigram model's loss on the windows that `evaluate` takes."""
        return self.data.unigram(self._windows)

    def evaluate(self, params: Any) -> Evaluation:
        """Validation loss of `params` with the present balance bias."""
        return evaluate(self.eval_fn, params, self.state.balance_bias, self._windows, self.feed)

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
        if self.step < self.total_steps:
            self._program.wait(stop)
        latest, devices = self.checkpointer.latest, self.mesh.size
        records = Records(self.cfg, self.step, self.total_steps, devices, latest, progress_file)
        self.records, profile = records, StepProfile(self.out_dir / "profile", profile_steps, records)
        stopped = False
        try:
            for plan in self.schedules.plan(self.granularity, self.step, self.tokens):
                if stopped := self._stops(stop.is_set()):
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

    def _stops(self, wish: bool) -> bool:
        """Whether the run ends before this step. Is asked before each, by all processes."""
        return self._vote(wish)

    def _take(self, plan: StepPlan) -> Mapping[str, Any]:
        """This process's rows of the next batch."""
        return self.data.train.take(plan.batch_size)

    def _told(self) -> Mapping[str, float]:
        """What the host knows of the last batch, for its record."""
        return {}

    def _one_step(self, plan: StepPlan, records: Records) -> None:
        cfg = self.cfg.train
        hyper = self.schedules.of_step(plan, self.granularity)
        began = time.perf_counter()
        rows = self._take(plan)
        waited = time.perf_counter() - began
        if hyper.micro_batches is not None:
            rows = self.feed.filled_up(rows, cfg.batch_size)
        self.state, metrics = self.step_fn(self.state, self.feed.put(rows), hyper)
        self.step, self.tokens = plan.step + 1, plan.tokens + plan.batch_size * self.cfg.data.seq_len
        records.add(Step(self.step, self.tokens, plan.batch_size, hyper, metrics, waited, self._told()))
        if self.step % cfg.ema_every == 0:
            self.ema.update(self.state.params, metrics.finite)
            if not self._averaged:  # the first update compiles its program
                self._averaged = True
                records.pause()
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

"""`Records` writes the training loop's metrics, one step behind it.

Metrics of step n - 1 are read when those of step n are added, so that the loop does not wait for the device.
Of several processes, only the first writes and shows; all of them read, so that all stop at the same bad step.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.config import Config, to_dict
from deepseek_jax.parallel.processes.together import is_first
from deepseek_jax.training.advice import History, advice
from deepseek_jax.training.boards import TensorBoard, WeightsAndBiases, Writer
from deepseek_jax.training.evaluation import Evaluation
from deepseek_jax.training.finite import NonFiniteError
from deepseek_jax.training.metrics import MetricsFile, each_record, max_vio
from deepseek_jax.training.progress import Progress
from deepseek_jax.training.state import Hyper
from deepseek_jax.training.step import Metrics
from deepseek_jax.training.throughput import Throughput, peak_flops

_COUNTS = 256  # numbers of `expert_counts` that a record may hold on average


class Step(NamedTuple):
    """What is known of a step when it has been dispatched; `metrics` are still on the devices. data_seconds: how long
    the host waited for its batch; told: what else it knows of it, by name."""

    step: int
    tokens: int
    batch_size: int
    hyper: Hyper
    metrics: Metrics
    data_seconds: float
    told: Mapping[str, float] = MappingProxyType({})


class Written:
    """The records of a run, in its metrics file and wherever else they are watched.

    Args:
        cfg: the run's; says where.
        resume_step: None starts anew; else what was written after this step goes.
    """

    def __init__(self, cfg: Config, resume_step: int | None = None):
        directory = Path(cfg.train.out_dir)
        self._file = MetricsFile(directory, resume_step)
        self.history = History(each_record(self._file.path))
        self._writers: list[Writer] = [self._file, TensorBoard(directory, to_dict(cfg), resume_step)]
        if cfg.train.wandb:
            resumed = resume_step is not None
            self._writers.append(WeightsAndBiases(directory, to_dict(cfg), cfg.train.wandb, resumed))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record; not again what a resumed run already has, the evaluation at the step of its checkpoint."""
        if self._file.has(kind, step):
            return
        self.history.add({"kind": kind, "step": step, **values})
        for writer in self._writers:
            writer.write(kind, step, values)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class Records:
    """Metrics file, boards and progress line of a run.

    Args:
        cfg: the run's.
        step: steps taken before.
        total_steps: of the whole run.
        devices: how many compute together.
        last_checkpoint: the step of the newest one.
        progress_file: where the progress line goes; None: stderr.
    """

    def __init__(
        self,
        cfg: Config,
        step: int,
        total_steps: int,
        devices: int,
        last_checkpoint: Callable[[], int | None],
        progress_file: Any = None,
    ):
        self._cfg, self._total_steps, self._last_checkpoint = cfg, total_steps, last_checkpoint
        self._written = Written(cfg, step or None) if is_first() else None
        self._progress = Progress(total_steps, step, progress_file) if is_first() else None
        peak = peak_flops(jax.local_devices()[0])
        flops = cfg.model.flops_per_token(cfg.data.seq_len)
        self._throughput = Throughput(flops, peak and peak * devices)
        self._pending: Step | None = None
        self._said: set[str] = set()
        self._tokens_per_s: float | None = None

    def add(self, done: Step) -> None:
        """A step that has just been dispatched."""
        self.flush()
        self._pending = done

    def flush(self) -> None:
        """Read and write what is pending. Raises NonFiniteError where the run must stop."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        host = jax.device_get(pending.metrics)
        speed = self._throughput.update(pending.tokens)  # at once: the time counts
        self._write(pending, host, speed)
        if not host.finite:
            self._not_finite(pending.step, host)

    def _write(self, done: Step, host: Metrics, speed: dict[str, float]) -> None:
        if self._written is None or self._progress is None:
            return
        counted = done.step % max(1, host.counts_le.size // _COUNTS) == 0
        values = {
            **{name: float(x) for name, x in host.scalars.items()},
            "lr": float(done.hyper.lr),
            "gamma": float(done.hyper.gamma),
            "mtp_lambda": float(done.hyper.mtp_lambda),
            "batch_size": done.batch_size,
            "tokens": done.tokens,
            "max_vio": max_vio(host.counts_le),
            "expert_counts": np.asarray(host.counts_le) if counted else None,
            "skipped": int(host.skipped),
            **done.told,
            **({"data_seconds": done.data_seconds, **speed} if speed else {}),
        }
        values = {name: value for name, value in values.items() if value is not None}
        self._written.write("train", done.step, values)
        self._progress.update(done.step, values, self._seconds_left(done, speed))

    def _seconds_left(self, done: Step, speed: dict[str, float]) -> float | None:
        self._tokens_per_s = speed.get("tokens_per_s", self._tokens_per_s)
        tokens = (self._total_steps - done.step) * done.batch_size * self._cfg.data.seq_len
        return tokens / self._tokens_per_s if self._tokens_per_s else None

    def say(self, text: str) -> None:
        """A line of its own above the progress line."""
        if self._progress is not None:
            self._progress.write(text)

    def _not_finite(self, step: int, host: Metrics) -> None:
        what = ", ".join(f"{name}={x}" for name, x in host.scalars.items() if not np.isfinite(x))
        self.say(f"step {step} skipped: {what} ({int(host.bad_steps)} in a row)")
        limit = self._cfg.train.max_bad_steps
        if host.bad_steps >= limit:
            raise NonFiniteError(
                f"step {step}: {what}; {int(host.bad_steps)} steps in a row were skipped "
                f"(train.max_bad_steps={limit}). The last checkpoint, step {self._last_checkpoint()}, is kept; "
                f"lower optimizer.peak_lr and go on from there, or from before with --from_step and --discard_newer"
            )

    def evaluation(self, step: int, evaluation: Evaluation, unigram_loss: float | None = None) -> None:
        """Writes and shows it, and says what is wrong with a run that goes on, each thing once."""
        self.pause()
        if self._written is None:
            return
        self._written.write("eval", step, evaluation._asdict())
        self.say(
            f"step {step}: validation loss {evaluation.loss:.3f}, {evaluation.bits_per_byte:.3f} bits per byte"
        )
        for one in advice(self._cfg, self._written.history, unigram_loss):
            if one.about not in self._said and step < self._total_steps:
                self._said.add(one.about)
                self.say(f"warning: {one.text}")

    def held_out(self, step: int, values: Mapping[str, float], text: str) -> None:
        """Writes and shows what answers to held-out questions were like."""
        self.pause()
        if self._written is not None:
            self._written.write("eval", step, values)
            self.say(f"step {step}: {text}")

    def samples(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts that the model wrote, by title."""
        if self._written is not None:
            self._written.write("samples", step, texts)

    def pause(self) -> None:
        """After work that is no training, so that it does not count in tokens/s."""
        self._throughput.pause()

    def end(self) -> None:
        """The last step was taken: the progress line ends."""
        if self._progress is not None:
            self._progress.close()

    def close(self) -> None:
        """Nothing more is written."""
        if self._written is not None:
            self._written.close()

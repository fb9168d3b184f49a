"""What the training loop writes down, one step behind it.

What was handed in for step n - 1 is read when step n is handed in, so that the loop does not wait for the device.
Of several processes, only the first writes and shows; all of them read, so that all stop at the same bad step.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.parallel.together import is_first
from deepseek_jax.training.finite import NonFiniteError
from deepseek_jax.training.metrics import MetricsWriter, Progress, Throughput, max_vio, peak_flops
from deepseek_jax.training.state import Hyper
from deepseek_jax.training.step import Metrics

if TYPE_CHECKING:
    from deepseek_jax.training.loop import Trainer


class Evaluation(NamedTuple):
    """On the validation windows: nats per token, bits per byte."""

    loss: float
    bits_per_byte: float


class Records:
    """Metrics file, TensorBoard and progress line of a run.

    Args:
        trainer: the run, as far as it has come.
        progress_file: where the progress line goes; None: stderr.
    """

    def __init__(self, trainer: "Trainer", progress_file: Any):
        cfg, self._trainer = trainer.cfg, trainer
        resumed = trainer.step if trainer.step else None
        self._writer = MetricsWriter(trainer.out_dir, resumed) if is_first() else None
        self._progress = Progress(trainer.total_steps, trainer.step, progress_file) if is_first() else None
        peak = peak_flops(cfg.model.dtype).flops * trainer.mesh.size if is_first() else None
        self._throughput = Throughput(cfg.model.flops_per_token(cfg.data.seq_len), peak)
        self._pending: tuple[int, int, int, Hyper, Metrics] | None = None

    def add(self, step: int, tokens: int, batch_size: int, hyper: Hyper, metrics: Metrics) -> None:
        self.flush()
        self._pending = (step, tokens, batch_size, hyper, metrics)

    def flush(self) -> None:
        """Read and write what is pending. Raises NonFiniteError where the run must stop."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, tokens, batch_size, hyper, metrics = pending
        host = jax.device_get(metrics)
        self._write(step, tokens, batch_size, hyper, host)
        if not host.finite:
            self._not_finite(step, host)

    def _write(self, step: int, tokens: int, batch_size: int, hyper: Hyper, host: Metrics) -> None:
        if self._writer is None or self._progress is None:
            return
        values = {
            "loss": float(host.loss),
            "mtp_loss": float(host.mtp_loss) if self._trainer.cfg.model.num_nextn_predict_layers else None,
            "balance_loss": float(host.balance_loss),
            "grad_norm": float(host.grad_norm),
            "lr": float(hyper.lr),
            "gamma": float(hyper.gamma),
            "mtp_lambda": float(hyper.mtp_lambda),
            "batch_size": batch_size,
            "tokens": tokens,
            "max_vio": np.asarray(max_vio(host.counts_le)),
            "expert_counts": np.asarray(host.counts_le),
            "skipped": int(host.skipped),
            **self._throughput.update(tokens),
        }
        values = {name: value for name, value in values.items() if value is not None}
        self._writer.write("train", step, values)
        self._progress.update(step, values)

    def _say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.write(text)

    def _not_finite(self, step: int, host: Metrics) -> None:
        names = ("loss", "mtp_loss", "grad_norm")
        what = ", ".join(f"{n}={getattr(host, n)}" for n in names if not np.isfinite(getattr(host, n)))
        self._say(f"step {step} skipped: {what} ({int(host.bad_steps)} in a row)")
        limit = self._trainer.cfg.train.max_bad_steps
        if host.bad_steps >= limit:
            kept = self._trainer.checkpointer.latest()
            raise NonFiniteError(
                f"step {step}: {what}; {int(host.bad_steps)} steps in a row were skipped "
                f"(train.max_bad_steps={limit}). The last checkpoint, step {kept}, is kept; "
                f"lower optimizer.peak_lr or resume from there with other data"
            )

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        if self._writer is not None:
            self._writer.write("eval", step, evaluation._asdict())
        self._say(
            f"step {step}: validation loss {evaluation.loss:.3f}, {evaluation.bits_per_byte:.3f} bits per byte"
        )
        self.pause()

    def pause(self) -> None:
        """After work that is no training, so that it does not count in tokens/s."""
        self._throughput.pause()

    def close(self) -> None:
        if self._writer is not None and self._progress is not None:
            self._writer.close()
            self._progress.close()

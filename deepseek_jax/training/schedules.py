"""Learning rate, batch size, balance-bias speed and MTP weight as functions of the tokens consumed (section 4.2).

With `optimizer.schedule` "constant", "cosine" or "wsd", the learning rate is a simple function of the step (of
`train.steps`) instead, and the batch is constant unless `optimizer.batch_ramp` is set.

Plain Python on the host: token counts are exact integers, boundaries are compared exactly. A boundary of the
14.8T run is scaled by total_tokens / schedule_tokens; at a boundary the value after it holds.

What the report leaves open, and the choice here:
- shape of the batch-size ramp: linear in tokens, rounded down to `granularity` sequences, so that the full
  batch is reached exactly at the end of the ramp; a `batch_start` above the full batch (or 0) means no ramp;
- warm-up of a shorter run: the same fraction of its steps as in the report (2K of about 243K), but no fewer
  than 20 steps or a tenth of the run, whichever is less, and never more than `warmup_steps`.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config import OptimizerConfig, TrainConfig
from deepseek_jax.training.state import Hyper

# Steps of the report's run: 14.8T tokens at 4096 per sequence with the ramp 3072 -> 15360 over 469B.
REPORT_STEPS = 242_785
_MIN_WARMUP_STEPS = 20


def _cosine(done: float) -> float:
    """From 1 to 0 while `done` goes from 0 to 1."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


class StepPlan(NamedTuple):
    """One step of a run: `step` steps and `tokens` tokens came before it."""

    step: int
    tokens: int
    batch_size: int  # sequences


class Schedules:
    """The report's schedules, stretched or shrunk to a run of `total_tokens`, or a simple one of the learning rate.

    Args:
        optimizer: values and boundaries.
        train: `batch_size` after the ramp, in sequences.
        total_tokens: length of the run.
        seq_len: tokens per sequence.

    Raises:
        ValueError: lengths that are not positive, boundaries out of order, a warm-up and a decay that do not fit.
    """

    def __init__(self, optimizer: OptimizerConfig, train: TrainConfig, total_tokens: int, seq_len: int):
        if total_tokens <= 0 or seq_len <= 0:
            raise ValueError(f"total_tokens={total_tokens} and seq_len={seq_len} must be positive")
        self.total_tokens, self.seq_len = int(total_tokens), seq_len
        self._optimizer, self._train = optimizer, train
        self._constant_until = self._scaled("constant_until_tokens")
        self._cosine_until = self._scaled("cosine_until_tokens")
        self._mid_until = self._scaled("mid_until_tokens")
        self._gamma_until = self._scaled("gamma_until_tokens")
        self._mtp_lambda_until = self._scaled("mtp_lambda_until_tokens")
        self._batch_ramp = self._scaled("batch_ramp_tokens")
        if not 0 <= self._constant_until <= self._cosine_until <= self._mid_until:
            raise ValueError(
                "optimizer: constant_until_tokens, cosine_until_tokens, mid_until_tokens must not decrease, got "
                f"{optimizer.constant_until_tokens}, {optimizer.cosine_until_tokens}, {optimizer.mid_until_tokens}"
            )
        self._report = optimizer.schedule == "deepseek_v3"
        self.warmup_steps = self._scaled_warmup() if self._report else self._checked_warmup()

    def _batch_start(self, granularity: int) -> int:
        """Sequences of the first step: `batch_start`, if that is smaller than the full batch, in whole micro-batches.

        So there is no ramp where a batch is one micro-batch (train.grad_accumulation=1).
        """
        full = self._train.batch_size
        ramp = self._optimizer.schedule == "deepseek_v3" or self._optimizer.batch_ramp
        start = min(self._optimizer.batch_start or full, full) if ramp else full
        return max(granularity, start // granularity * granularity)

    def ramps(self, granularity: int) -> bool:
        """Whether the batch size changes during the run."""
        return self._batch_start(granularity) < self._train.batch_size

    @classmethod
    def of_steps(
        cls, optimizer: OptimizerConfig, train: TrainConfig, seq_len: int, granularity: int = 1
    ) -> "Schedules":
        """The schedules of a run of exactly `train.steps` steps, ramp included.

        The ramp's length depends on the run's tokens and these on the ramp; the longest run that ends with
        its step number `train.steps` is found by bisection.
        """
        low, high = 1, train.steps * train.batch_size * seq_len
        while low < high:
            middle = (low + high + 1) // 2
            if cls(optimizer, train, middle, seq_len).num_steps(granularity) <= train.steps:
                low = middle
            else:
                high = middle - 1
        return cls(optimizer, train, low, seq_len)

    # --- values -------------------------------------------------------------------------------------------

    def lr(self, step: int, tokens: int) -> float:
        """Learning rate of the step before which `step` steps and `tokens` tokens were consumed.

        Linear from 0 over the warm-up, then as `optimizer.schedule` says.
        """
        lr = self._report_lr(tokens) if self._report else self._simple_lr(step)
        return lr * step / self.warmup_steps if step < self.warmup_steps else lr

    def _report_lr(self, tokens: int) -> float:
        """Constant, cosine to `mid_lr`, `mid_lr`, `final_lr`."""
        c = self._optimizer
        if tokens >= self._mid_until:
            return c.final_lr
        if tokens >= self._cosine_until:
            return c.mid_lr
        if tokens >= self._constant_until:
            done = (tokens - self._constant_until) / (self._cosine_until - self._constant_until)
            return c.mid_lr + (c.peak_lr - c.mid_lr) * _cosine(done)
        return c.peak_lr

    def _simple_lr(self, step: int) -> float:
        """Constant; cosine from the end of the warm-up to that of the run; or constant, then linear to the end."""
        c, steps = self._optimizer, self._train.steps
        step = min(step, steps)
        if c.schedule == "constant" or step <= self.warmup_steps:
            return c.peak_lr
        if c.schedule == "cosine":
            left = _cosine((step - self.warmup_steps) / (steps - self.warmup_steps))
        else:
            left = min(1.0, (steps - step) / (c.decay_fraction * steps)) if c.decay_fraction else 1.0
        return c.peak_lr * (c.final_fraction + (1.0 - c.final_fraction) * left)

    def gamma(self, tokens: int) -> float:
        """Speed of the balance-bias update: constant, then 0 (0.001 up to 14.3T)."""
        return self._optimizer.gamma if tokens < self._gamma_until else 0.0

    def mtp_lambda(self, tokens: int) -> float:
        """Weight of the MTP loss (0.3 up to 10T, then 0.1)."""
        c = self._optimizer
        return c.mtp_lambda if tokens < self._mtp_lambda_until else c.mtp_lambda_final

    def batch_size(self, tokens: int, granularity: int = 1) -> int:
        """Sequences of the step that starts at `tokens`, a multiple of `granularity`.

        Args:
            granularity: sequences of one micro-batch over all devices: a batch is a number of these.

        Raises:
            ValueError: `granularity` does not divide batch_size.
        """
        full = self._train.batch_size
        if granularity <= 0 or full % granularity:
            raise ValueError(
                f"train.batch_size={full} must be a multiple of {granularity}, the sequences of a micro-batch over all "
                "devices"
            )
        start = self._batch_start(granularity)
        if tokens >= self._batch_ramp:
            return full
        return start + granularity * ((full - start) * tokens // (self._batch_ramp * granularity))

    def hyper(self, step: int, tokens: int) -> Hyper:
        """The scalars of one step, float32 []; NumPy's, which cost no transfer before the step is dispatched."""
        values = (self.lr(step, tokens), self.gamma(tokens), self.mtp_lambda(tokens))
        scalars: list[Any] = [np.asarray(value, np.float32) for value in values]
        return Hyper(*scalars)

    def of_step(self, plan: "StepPlan", granularity: int) -> Hyper:
        """`hyper`, with the number of micro-batches where it changes during the run."""
        hyper = self.hyper(plan.step, plan.tokens)
        if not self.ramps(granularity):
            return hyper
        return hyper._replace(micro_batches=np.int32(plan.batch_size // granularity))

    # --- the run as a sequence of steps -------------------------------------------------------------------

    def plan(self, granularity: int = 1, step: int = 0, tokens: int = 0) -> Iterator[StepPlan]:
        """Every step from (`step`, `tokens`) on, until `total_tokens` are consumed (the last may overshoot)."""
        while tokens < self.total_tokens:
            batch_size = self.batch_size(tokens, granularity)
            yield StepPlan(step, tokens, batch_size)
            step, tokens = step + 1, tokens + batch_size * self.seq_len

    def num_steps(self, granularity: int = 1) -> int:
        """Steps that consume `total_tokens`: the length of `plan`, without walking the constant part."""
        start, full = self._batch_start(granularity), self._train.batch_size
        steps = tokens = 0
        while tokens < self.total_tokens:
            batch_size = self.batch_size(tokens, granularity)
            end = self.total_tokens
            if batch_size < full:  # the first token count at which the next larger batch is due
                larger = batch_size + granularity - start
                end = min(end, -(-larger * self._batch_ramp // (full - start)))
            count = -(-(end - tokens) // (batch_size * self.seq_len))
            steps, tokens = steps + count, tokens + count * batch_size * self.seq_len
        return steps

    # --- checks and scaling -------------------------------------------------------------------------------

    def _checked_warmup(self) -> int:
        c, steps = self._optimizer, self._train.steps
        decay = math.ceil(c.decay_fraction * steps) if c.schedule == "wsd" else 0
        if c.warmup_steps >= steps or c.warmup_steps + decay > steps:
            also = f", of which the decay takes {decay} (optimizer.decay_fraction)" if decay else ""
            raise ValueError(
                f"optimizer.warmup_steps={c.warmup_steps} does not fit into train.steps={steps}{also}: lower it, "
                f"for instance to {steps // 20}; schedule {c.schedule!r} warms up for exactly so many"
            )
        return c.warmup_steps

    def _scaled(self, name: str) -> int:
        c = self._optimizer
        # Fractions: a float quotient would move the boundaries of a long run by some tokens.
        return round(Fraction(getattr(c, name)) * self.total_tokens / Fraction(c.schedule_tokens))

    def _scaled_warmup(self) -> int:
        c = self._optimizer
        if self.total_tokens >= c.schedule_tokens:
            return c.warmup_steps
        # Close enough without the granularity, which moves the number of steps by a few per mille.
        start, full, seq_len = self._batch_start(1), self._train.batch_size, self.seq_len
        ramp = min(self._batch_ramp, self.total_tokens)
        ramp_batch = (full - start) / math.log(full / start) if full > start else full
        steps = (ramp / ramp_batch + (self.total_tokens - ramp) / full) / seq_len
        proportional = round(c.warmup_steps * steps / REPORT_STEPS)
        at_least = min(_MIN_WARMUP_STEPS, math.ceil(steps / 10))
        return min(c.warmup_steps, max(proportional, at_least))

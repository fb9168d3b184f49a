"""`StepProfile` profiles some steps of a run: the work of devices and host on one time axis."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from deepseek_jax.parallel.processes.together import is_first
from deepseek_jax.training.records import Records


class StepProfile:
    """`jax.profiler`'s trace of the steps `first` to `last`, on CPU, GPU or TPU. Of several processes, the first's.

    Args:
        directory: where the trace goes.
        steps: (first, last), counted from 1, both included; None: no profile.
        records: of the run; says where the trace lies.
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None, records: Records):
        self._directory, self._records = directory, records
        self._steps = steps if is_first() else None
        self._begun: int | None = None

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around step number `step`."""
        wanted = self._steps is not None and self._steps[0] <= step <= self._steps[1]
        if wanted and self._begun is None:
            self._records.flush()  # the steps before
            jax.profiler.start_trace(self._directory)
            self._records.pause()
            self._begun = step
        yield
        if wanted and self._steps is not None and step == self._steps[1]:
            self._records.flush()  # waits until the step is done
            self._end(step)

    def close(self, step: int) -> None:
        """The run has ended after `step` steps, perhaps within the profile or before it."""
        if self._begun is not None:
            self._end(step)
        elif self._steps is not None:
            self._records.say(
                f"no profile: steps {self._steps[0]} to {self._steps[1]} were not among those taken"
            )
            self._steps = None

    def _end(self, step: int) -> None:
        jax.profiler.stop_trace()
        self._records.pause()
        trace = max(self._directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
        self._records.say(
            f"profile of steps {self._begun} to {step}: {trace} (open it at https://ui.perfetto.dev)"
        )
        self._steps = self._begun = None

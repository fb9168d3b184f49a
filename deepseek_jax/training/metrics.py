"""The metrics of a run: MaxVio, and the file of records.

Every record has "kind" ("train", "eval", ...) and "step", the number of steps taken when it was made; the loss
is in nats per token. Where there are many experts, only every n-th training record has "expert_counts" [L, E]: at
full size, those of all steps would fill 19 GB.

A resumed run drops the records after its checkpoint, so that its file ends up equal to an uninterrupted run's but for
the fields in `TIMINGS`. For that, write the records of a step before its checkpoint.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

METRICS_FILE = "metrics.jsonl"
# Fields that differ from run to run.
TIMINGS = frozenset(
    {"step_seconds", "data_seconds", "tokens_per_s", "mfu", "sampling_seconds", "scoring_seconds"}
)


def max_vio(counts_le: Any) -> np.ndarray:
    """Maximal violation of balance per layer (Wang et al. 2024, arXiv 2408.15664, equation 4).

    NumPy's: on the device, it would wait behind the step that is running there.

    Args:
        counts_le: tokens that each expert got, [..., L, E], any number dtype.

    Returns:
        Load of the fullest expert over the mean load, minus 1: float32 [..., L]; 0 is perfect balance, E/k - 1
        the worst. 0 for a layer without tokens.
    """
    counts_le = np.asarray(counts_le, np.float32)
    mean_l = counts_le.mean(-1)
    return np.where(mean_l > 0, counts_le.max(-1) / np.where(mean_l > 0, mean_l, 1) - 1, 0).astype(np.float32)


def each_record(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, in order, one at a time; a last line that a kill cut short is left out.

    Raises:
        ValueError: another line is not a record; names the file and the line.
    """
    with Path(path).open("rb") as file:  # what is no text is no record either
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                record["kind"], record["step"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if file.readline():
                    raise ValueError(
                        f"{path}, line {number} is not a metrics record: {line.strip()[:80].decode(errors='replace')!r}"
                    ) from error
                return
            yield record


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a metrics file. Raises as `each_record` does."""
    return list(each_record(path))


class MetricsFile:
    """Appends records to `<directory>/metrics.jsonl`.

    Args:
        directory: the run's; created if missing.
        resume_step: None starts anew; else the records after this step are dropped first.

    Attributes:
        path: of the file.
    """

    def __init__(self, directory: str | Path, resume_step: int | None = None):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / METRICS_FILE
        self._last: set[tuple[str, int]] = set()  # the records of the checkpoint's step
        # Replaced in one go: a kill here must not lose the records before the checkpoint.
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as file:
            if resume_step is not None and self.path.exists():
                self._keep(resume_step, file)
        os.replace(temporary, self.path)
        self._file = self.path.open("a")

    def _keep(self, resume_step: int, file: TextIO) -> None:
        for record in each_record(self.path):
            if record["step"] <= resume_step:
                file.write(json.dumps(record) + "\n")
            if record["step"] == resume_step:
                self._last.add((record["kind"], resume_step))

    def has(self, kind: str, step: int) -> bool:
        """Whether a resumed run has this record already: the evaluation at the step of its checkpoint."""
        return (kind, step) in self._last

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record. Values: numbers, text, or arrays (converted here, so pass what has arrived on the host).

        Numbers that are not finite become null.
        """
        plain = {name: _finite(np.asarray(value).tolist()) for name, value in values.items()}
        record = {"kind": kind, "step": int(step), **plain}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()  # to the operating system: survives a kill of this process

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a run records and shows: JSON lines, TensorBoard, the progress line, tokens/s, MFU and MaxVio.

Every record has "kind" ("train", "eval", ...) and "step", the number of steps taken when it was made; the loss
is in nats per token. A resumed run drops the records after its checkpoint, so that its file ends up equal to an
uninterrupted run's but for the fields in `TIMINGS`. For that, write the records of a step before its checkpoint.
"""

import collections
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

METRICS_FILE = "metrics.jsonl"
TIMINGS = frozenset({"seconds", "tokens_per_s", "mfu"})  # fields that differ from run to run


def max_vio(counts_le: jax.Array) -> jax.Array:
    """Maximal violation of balance per layer (Wang et al. 2024, arXiv 2408.15664, equation 4).

    Args:
        counts_le: tokens that each expert got, [..., L, E], any number dtype.

    Returns:
        Load of the fullest expert over the mean load, minus 1: float32 [..., L]; 0 is perfect balance, E/k - 1
        the worst. 0 for a layer without tokens.
    """
    counts_le = jnp.asarray(counts_le, jnp.float32)
    mean_l = counts_le.mean(-1)
    return jnp.where(mean_l > 0, counts_le.max(-1) / jnp.where(mean_l > 0, mean_l, 1.0) - 1.0, 0.0)


# --- records ----------------------------------------------------------------------------------------------


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; a last line that a kill cut short is left out.

    Raises:
        ValueError: another line is not a record; names the file and the line.
    """
    lines = Path(path).read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["kind"], record["step"]
            records.append(record)
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not a metrics record: {line[:80]!r}") from error
    return records


def _tensorboard() -> Any:
    """tensorboardX. It would load PyTorch where there is one, for seconds, to take tensors that nobody hands it."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # its import raises ImportError
    try:
        import tensorboardX
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX


class MetricsWriter:
    """Appends records to `<directory>/metrics.jsonl` and to TensorBoard event files beside it.

    Args:
        directory: the run's; created if missing.
        resume_step: None starts anew; else the records after this step are dropped first.
    """

    def __init__(self, directory: str | Path, resume_step: int | None = None):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / METRICS_FILE
        kept = []
        if resume_step is not None and self.path.exists():
            kept = [record for record in read_records(self.path) if record["step"] <= resume_step]
        # Replaced in one go: a kill here must not lose the records before the checkpoint.
        self._kept = {(record["kind"], record["step"]) for record in kept}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a")
        purge = None if resume_step is None else resume_step + 1
        self._board = _tensorboard().SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record. Values: numbers, or arrays (converted here, so pass what has arrived on the host).

        A record that a resumed run already has, the evaluation at the step of its checkpoint, is not repeated.

        Numbers that are not finite become null in JSON and are left out of TensorBoard, which gets numbers as
        scalars, vectors as one scalar per index, and matrices [layer, expert] as a histogram of the load
        relative to its layer's mean.
        """
        if (kind, step) in self._kept:
            return
        plain = {name: np.asarray(value).tolist() for name, value in values.items()}
        record = {"kind": kind, "step": int(step), **{name: _finite(value) for name, value in plain.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()  # to the operating system: survives a kill of this process
        for name, value in plain.items():
            self._write_board(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _write_board(self, tag: str, value: Any, step: int) -> None:
        array = np.asarray(value)
        if not np.issubdtype(array.dtype, np.number):
            return
        if array.ndim == 1:
            for index, element in enumerate(array):
                self._write_board(f"{tag}/{index}", element, step)
        elif not array.size or not np.isfinite(array).all():
            return
        elif array.ndim == 0:
            self._board.add_scalar(tag, float(array), step)
        else:
            mean = np.maximum(array.mean(-1, keepdims=True), np.finfo(np.float32).tiny)
            self._board.add_histogram(tag, (array / mean).ravel(), step)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- progress and speed -----------------------------------------------------------------------------------


class Progress:
    """One line on stderr: loss, MTP loss, tokens/s, MFU, MaxVio and the time left.

    Args:
        total_steps: of the whole run.
        initial: steps taken before, in a resumed run.
        file: default stderr; if it is no terminal, a line is written twice a minute.
    """

    def __init__(self, total_steps: int, initial: int = 0, file: Any = None):
        file = sys.stderr if file is None else file
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=initial,
            file=file,
            mininterval=0.2 if file.isatty() else 30.0,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows `step` steps taken, and of `values` (a record): loss, mtp_loss, tokens_per_s, mfu, max_vio."""
        self._bar.set_postfix_str(progress_text(values), refresh=False)
        self._bar.update(step - self._bar.n)

    def write(self, text: str) -> None:
        """A line of its own above the bar."""
        self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()


def progress_text(values: Mapping[str, Any]) -> str:
    """The figures of a record as one short text; missing ones are left out. MaxVio: mean over the layers."""
    formats: dict[str, Callable[[Any], str]] = {
        "loss": lambda x: f"loss {x:.3f}",
        "mtp_loss": lambda x: f"MTP {x:.3f}",
        "tokens_per_s": lambda x: f"{x:,.0f} tok/s",
        "mfu": lambda x: f"MFU {x:.1%}",
        "max_vio": lambda x: f"MaxVio {np.mean(x):.2f}" if np.size(x) else "",
    }
    texts = (show(values[name]) for name, show in formats.items() if values.get(name) is not None)
    return ", ".join(text for text in texts if text)


class Throughput:
    """Tokens per second over the last steps, and the model FLOPs utilisation that this makes.

    Args:
        flops_per_token: training FLOPs of one token.
        peak: FLOP/s of all devices together; None: no MFU.
        window: steps averaged over.
        clock: seconds.
    """

    def __init__(
        self,
        flops_per_token: float,
        peak: float | None,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._flops_per_token, self._peak, self._clock = flops_per_token, peak, clock
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=window + 1)

    def update(self, tokens: int) -> dict[str, float]:
        """Call when a step is done; `tokens`: consumed in the run so far.

        Returns:
            {"tokens_per_s", "mfu"}; empty at the first call, so that compilation is not counted.
        """
        self._marks.append((self._clock(), tokens))
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        if end <= start:
            return {}
        rate = (last - first) / (end - start)
        speed = {"tokens_per_s": rate}
        if self._peak:
            speed["mfu"] = rate * self._flops_per_token / self._peak
        return speed

    def pause(self) -> None:
        """Call after work that is no training (evaluation, checkpoint): the next `update` starts afresh."""
        self._marks.clear()


class Peak(NamedTuple):
    """FLOP/s of one device, and where the figure comes from: "data sheet" or "measured"."""

    flops: float
    source: str


# Dense bf16 with float32 accumulation, NVIDIA's and Google's data sheets; the first name that occurs counts.
_DATA_SHEET = (
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H800 PCIe", 756e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
)


def peak_flops(dtype: str = "float32", device: jax.Device | None = None) -> Peak:
    """Peak matmul rate of a device (default: this process's first).

    Known accelerators: dense bf16 of the data sheet, whatever `dtype` is, as published MFU figures have it.
    CPUs and others: the best of square matmuls of `dtype`, measured for 0.3 s once per process; on an idle
    machine, this is what XLA can reach.
    """
    device = jax.local_devices()[0] if device is None else device
    for name, flops in _DATA_SHEET:
        if device.platform != "cpu" and name.lower() in device.device_kind.lower():
            return Peak(flops, "data sheet")
    return Peak(_measured_peak(device, dtype), "measured")


@functools.cache
def _measured_peak(device: jax.Device, dtype: str, size: int = 1024, seconds: float = 0.3) -> float:
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    matmul = jax.jit(jnp.dot)
    matmul(x, x).block_until_ready()
    best, end = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        matmul(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best

"""`Throughput` measures tokens per second and the share of the peak; `HostTime` measures the wait for data."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import jax


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
        """Call the moment a step is done; `tokens`: consumed in the run so far.

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
        """Call after what is no training (evaluation, compilation): the next `update` starts afresh."""
        self._marks.clear()


class HostTime:
    """Where the host's time goes from the dispatch of one step to that of the next. It waits for no device.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._data = clock, 0.0
        self._dispatched: float | None = None

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = self._clock()
        yield
        self._data += self._clock() - began

    def dispatched(self) -> dict[str, float]:
        """Call when a step has been dispatched.

        Returns:
            {"step_seconds": since the dispatch before, "data_seconds": the wait for data in that time}; empty at the
            first call.
        """
        now = self._clock()
        before, data = self._dispatched, self._data
        self._dispatched, self._data = now, 0.0
        return {} if before is None else {"step_seconds": now - before, "data_seconds": data}

    def pause(self) -> None:
        """Call after what is no training: the next `dispatched` starts afresh."""
        self._dispatched = None


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


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s of dense bf16 in the device's data sheet, as published MFU figures have it; None if there is none.

    A CPU has none: what its cores reach depends on who else uses them, and a share of that says nothing.
    """
    if device.platform == "cpu":
        return None
    kind = device.device_kind.lower()
    return next((flops for name, flops in _DATA_SHEET if name.lower() in kind), None)

"""`Throughput` measures seconds of a step, tokens per second, and the share of the peak that these make."""

import collections
import time
from collections.abc import Callable

import jax


class Throughput:
    """Seconds of each step; tokens per second over the last steps, and the model FLOPs utilisation that this makes.

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
            {"step_seconds": since the step before was done, "tokens_per_s", "mfu"}; empty at the first call, so that
            compilation is not counted.
        """
        self._marks.append((self._clock(), tokens))
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        if end <= start:
            return {}
        rate = (last - first) / (end - start)
        speed = {"step_seconds": end - self._marks[-2][0], "tokens_per_s": rate}
        if self._peak:
            speed["mfu"] = rate * self._flops_per_token / self._peak
        return speed

    def pause(self) -> None:
        """Call after what is no training (evaluation, compilation): the next `update` starts afresh."""
        self._marks.clear()


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

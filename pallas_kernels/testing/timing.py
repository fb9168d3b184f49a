"""Times one op on the device, without launch overhead and with cold caches.

One program calls the op on each of several sets of inputs, together larger than twice the L2 cache, and returns all
results: XLA drops a call whose result nobody reads, and merges calls of the same operands. On a GPU, CUPTI adds up the
time of the kernels; elsewhere the clock on the wall has to do. The median over repeats is reported.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

CACHE_BYTES = 50 * 2**20  # L2 of an H100
REPEATS = 9
MAX_SETS = 16


def num_sets(operands: Any, memory_bytes: int = 16 * 2**30) -> int:
    """Returns how many sets of such operands, arrays or their shapes, exceed twice the cache, within `memory_bytes`."""
    size = max(1, sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(operands)))
    return min(MAX_SETS, -(-2 * CACHE_BYTES // size) + 1, max(1, memory_bytes // size))


def each(fn: Callable) -> Any:
    """Returns a program: sets -> the results of all of them."""
    fn = jax.jit(fn)  # lowered once, however many sets
    return jax.jit(lambda sets: [fn(*operands) for operands in sets])


def seconds_per_call(run: Callable, sets: list[tuple], repeats: int = REPEATS) -> float:
    """Returns the median seconds per call of what `run`, a program of `each`, calls."""
    jax.block_until_ready(run(sets))  # compile and warm up
    once = _by_cupti if jax.default_backend() == "gpu" else _by_the_clock
    return statistics.median(once(run, sets) for _ in range(repeats)) / len(sets)


def _by_the_clock(run: Callable, sets: list[tuple]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(sets))
    return time.perf_counter() - start


def _by_cupti(run: Callable, sets: list[tuple]) -> float:
    from jax.experimental.mosaic.gpu import profiler

    measured: Any = profiler.measure(run)(sets)
    milliseconds = measured[1]
    if milliseconds is None:
        raise ValueError("CUPTI saw no kernel: another profiler may be attached to this process")
    return milliseconds / 1e3

"""Times one op on the device, without launch overhead and with cold caches.

Calls are chained inside one compiled program, so that the host launches once. Each call takes the next of several sets
of inputs, together larger than the L2 cache. The time of a short chain is subtracted from that of a long one, which
removes what both share; the median over repeats is reported.
"""

import statistics
import time
from collections.abc import Callable

import jax
from jax import lax

CACHE_BYTES = 50 * 2**20  # L2 of an H100
SHORT, LONG = 4, 44
REPEATS = 9
MAX_SETS = 16


def input_sets(make: Callable[[int], tuple], memory_bytes: int = 16 * 2**30) -> list[tuple]:
    """Makes operands from seeds 0, 1, ...: enough to exceed twice the cache, within `memory_bytes`."""
    first = make(0)
    size = sum(x.nbytes for x in jax.tree.leaves(first))
    wanted = min(MAX_SETS, -(-2 * CACHE_BYTES // max(size, 1)) + 1, max(1, memory_bytes // max(size, 1)))
    return [first, *(make(seed) for seed in range(1, wanted))]


def chain(fn: Callable, length: int) -> Callable:
    """Returns a program: sets -> last output of `length` calls, each ordered after the one before and none shared."""
    fn = jax.jit(fn)  # lowered once, however long the chain

    def run(sets):
        out = None
        for i in range(length):
            operands = sets[i % len(sets)]
            if out is not None:
                operands, out = lax.optimization_barrier((operands, out))
            out = fn(*operands)
        return out

    return jax.jit(run)


def median_seconds(
    fn: Callable, sets: list[tuple], short: int = SHORT, long: int = LONG, repeats: int = REPEATS
) -> float:
    """Returns the median seconds per call of `fn`."""
    programs = [chain(fn, length) for length in (short, long)]
    for program in programs:
        jax.block_until_ready(program(sets))  # compile and warm up
    samples = []
    for _ in range(repeats):
        ends = []
        for program in programs:
            start = time.perf_counter()
            jax.block_until_ready(program(sets))
            ends.append(time.perf_counter() - start)
        samples.append((ends[1] - ends[0]) / (long - short))
    return statistics.median(samples)

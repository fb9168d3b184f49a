"""Devices of a run. On CPU every core becomes one JAX device, and the batch is sharded over them.

One single-threaded device per core beats one device with a thread pool: matrix products of a model this size
are too small to be split well, and everything else would run on one core.
"""

import os

_COUNT = "--xla_force_host_platform_device_count"
_SINGLE = "--xla_cpu_multi_thread_eigen=false"


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_device_per_core(divides: int, at_most: int = 0) -> int:
    """Ask XLA for one CPU device per core: the most that divide `divides` sequences. Returns how many.

    Takes effect only before JAX touches its backends; has no effect on GPU runs. An XLA_FLAGS that already
    sets the device count is left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _COUNT in flags:
        return int(flags.split(_COUNT + "=")[1].split()[0])
    limit = min(at_most or cores(), cores())
    count = max(n for n in range(1, limit + 1) if divides % n == 0)
    force_devices(count)
    return count


def cpu_devices(count: int) -> None:
    """`force_devices`, unless an XLA_FLAGS already sets the device count."""
    if _COUNT not in os.environ.get("XLA_FLAGS", ""):
        force_devices(count)


def force_devices(count: int) -> None:
    """Ask XLA for `count` single-threaded CPU devices; in vain once JAX has touched its backends."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}={count} {_SINGLE}".strip()

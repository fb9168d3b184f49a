"""Chooses the devices of a run. On CPU every core becomes one JAX device, and the batch is sharded over them.

One single-threaded device per core beats one device with a thread pool: matrix products of a model this size
are too small to be split well, and everything else would run on one core.
"""

import contextlib
import ctypes
import os

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import named_devices

_COUNT = "--xla_force_host_platform_device_count"
_MOST = 1024  # of one process
_SINGLE = "--xla_cpu_multi_thread_eigen=false"
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def cores() -> int:
    """Returns how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices_of_run(cfg: Config, processes: int = 1, at_most: int = 0) -> int:
    """Asks XLA for the CPU devices of this process of a run; returns how many.

    The run has those that config.mesh names; where that leaves `data` open, as many more as there are cores for (and
    not more than `at_most` per process, unless it is 0) and as divide the sequences of a micro-batch. This has no
    effect on GPU runs, and none once JAX has touched its backends.
    """
    mesh, sequences = cfg.mesh, cfg.train.batch_size // cfg.train.grad_accumulation
    named, shards = named_devices(mesh), mesh.node * mesh.local
    available = processes * min(at_most or cores(), cores())
    counts = [1] if mesh.data else range(1, max(1, available // named) + 1)
    fitting = [n for n in counts if sequences % (n * shards) == 0 and named * n % processes == 0]
    count = max(1, named * max(fitting, default=1) // processes)
    cpu_devices(count)
    return count


def cpu_devices(count: int) -> None:
    """Calls `force_devices`, unless XLA_FLAGS already sets the device count or XLA cannot make so many."""
    if _COUNT not in os.environ.get("XLA_FLAGS", "") and count <= _MOST:
        force_devices(count)


def force_devices(count: int) -> None:
    """Asks XLA for `count` single-threaded CPU devices; this has no effect once JAX has touched its backends."""
    _keep_freed_memory()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}={count} {_SINGLE}".strip()


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, where this process runs on it.

    XLA allocates the temporaries of a program anew at every call. By default glibc asks the system for each large
    block and gives it back, and the system fills its pages with zeros again: a quarter of a training step's CPU time.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)

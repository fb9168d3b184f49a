"""One process at a time uses the GPU, while the others compile: a lock file, named by the environment."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

GPU_LOCK = "PALLAS_KERNELS_GPU_LOCK"  # names the file
LOCK = "gpu.lock"  # its name in the folder of a run


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Waits until no other process is inside; does nothing where the environment names no file. A process that dies
    leaves, too."""
    path = os.environ.get(GPU_LOCK)
    if not path:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""For which kind of device programs are made."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_FOR_GPUS = contextvars.ContextVar("for_gpus", default=False)


def on_cpu() -> bool:
    """Whether programs are for CPUs. There a program's control flow costs nothing; on GPUs XLA has the host wait for each
    branch, and for each turn of a loop whose length it does not know."""
    return not _FOR_GPUS.get() and jax.default_backend() == "cpu"


@contextlib.contextmanager
def as_on_gpus() -> Iterator[None]:
    """Within it, parameters are prepared and programs are made as for GPUs, whatever this machine has. What was traced before
    for the same arguments stays as it is."""
    token = _FOR_GPUS.set(True)
    try:
        yield
    finally:
        _FOR_GPUS.reset(token)

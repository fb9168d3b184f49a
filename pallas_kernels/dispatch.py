"""How a public op picks one of its implementations.

`implementation=None` picks by platform when the program is lowered: the Mosaic GPU kernel on CUDA if it supports the
operands, the XLA path everywhere else. A named implementation is used or refused with the reason; it never falls back.
"""

from collections.abc import Callable
from typing import Any

from jax import lax

from pallas_kernels.compat import why_not_hopper

IMPLEMENTATIONS = ("mosaic", "xla", "reference")


def dispatch(
    op: str,
    implementation: str | None,
    *operands: Any,
    mosaic: Callable[..., Any],
    xla: Callable[..., Any],
    reference: Callable[..., Any],
    unsupported: str | None,
) -> Any:
    """Apply one implementation of `op` to `operands`.

    Args:
      op: name of the op, for messages.
      implementation: None, "mosaic", "xla" or "reference".
      operands: arrays, or None for an absent operand; every implementation takes them all.
      mosaic, xla, reference: the implementations, with equal results up to rounding. `mosaic` should be jitted: with
        implementation=None it is traced on every platform, and the jit's cache makes that once per shape.
      unsupported: why the kernel cannot take these operands, or None if it can.

    Raises:
      ValueError: unknown implementation, or "mosaic" asked for where the kernel cannot run.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: implementation={implementation!r} is unknown; use None or one of {IMPLEMENTATIONS}"
        )
    if implementation == "reference":
        return reference(*operands)
    if implementation == "xla":
        return xla(*operands)
    unsupported = unsupported or why_not_hopper()
    if implementation == "mosaic":
        if unsupported:
            raise ValueError(f"{op}: the Mosaic GPU kernel does not support this call: {unsupported}")
        return mosaic(*operands)
    if unsupported:
        return xla(*operands)
    return lax.platform_dependent(*operands, cuda=mosaic, default=xla)

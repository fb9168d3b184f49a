"""Picks the implementation that a public op runs.

`implementation=None` picks by platform when the program is lowered: the Mosaic GPU kernel on CUDA if it supports the
operands, the XLA path everywhere else. Where CUDA gets the XLA path, a warning says so once per op, shapes and reason. A
named implementation is used or refused with the reason; it never falls back.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels.compat import why_not_hopper

IMPLEMENTATIONS = ("mosaic", "xla", "reference")
_LOG = logging.getLogger(__name__)


def dispatch(
    op: str,
    implementation: str | None,
    *operands: Any,
    mosaic: Callable[..., Any],
    xla: Callable[..., Any],
    reference: Callable[..., Any],
    unsupported: str | None,
) -> Any:
    """Applies one implementation of `op` to `operands`.

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
        mosaic = _noted(xla, f"{op} of {_shapes(operands)} runs without its GPU kernel: {unsupported}")
    return lax.platform_dependent(*operands, cuda=mosaic, default=xla)


# --- a program for CUDA logs its fallbacks ---------------------------------------------------------------

_note_p = Primitive("note")  # the identity; lowered for CUDA, it logs
_note_p.def_impl(lambda x, *, message: x)
_note_p.def_abstract_eval(lambda x, *, message: x)
ad.deflinear2(_note_p, lambda cotangent, x, *, message: [cotangent])
batching.defvectorized(_note_p)


def _lower_note(ctx: Any, x: Any, *, message: str) -> list[Any]:
    _warn_once(message)
    return [x]


mlir.register_lowering(_note_p, lambda ctx, x, *, message: [x])
mlir.register_lowering(_note_p, _lower_note, platform="cuda")


@functools.cache
def _warn_once(message: str) -> None:
    _LOG.warning(message)


def _shapes(operands: Any) -> str:
    return ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(operands))


def _noted(xla: Callable[..., Any], message: str) -> Callable[..., Any]:
    """Returns `xla` with a note at its first operand: lowering it for CUDA logs `message`."""
    return lambda first, *rest: xla(_note_p.bind(first, message=message), *rest)

"""The public function: rows to the peers of a mesh axis, gathered where they lie."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import dispatch
from pallas_kernels.peer_exchange import kernel, reference


def peer_exchange(
    x: jax.Array,
    rows: jax.Array,
    counts: jax.Array,
    axis: str | tuple[str, ...],
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sends rows[q, :counts[q]] of x to each device q of `axis`. Runs inside `shard_map` (check_vma=False).

    Nobody needs to know before how many rows will come, and no row is packed or zeroed: each is read where it lies, once per
    peer that gets it, and written where it belongs in that peer's memory.

    Args:
      x: [N, W] uint32, rows of words.
      rows: [P, M] int32, which of them goes to place j at device q; beyond the counts anything.
      counts: [P] int32, 0 to M.
      axis: of the mesh, P devices; or several axes, which count as one.
      implementation: None (by platform), "mosaic", "xla" or "reference". The kernel needs all devices of the mesh in the
        axis, each of which writes into the others' memory.

    Returns:
      out [P, M, W], in out[q, :received[q]] the rows that device q sent, in its order, and received [P] int32. What lies
      behind them is undefined.
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    _check(x, rows, counts, axes)
    plain = functools.partial(reference.peer_exchange, axis=axes)
    return dispatch(
        "peer_exchange",
        implementation,
        x,
        rows,
        counts,
        mosaic=functools.partial(kernel.peer_exchange, axis=axes),
        xla=plain,
        reference=plain,
        unsupported=kernel.unsupported(axes),
    )


def _check(x, rows, counts, axes: tuple[str, ...]) -> None:
    p = math.prod(lax.axis_size(axis) for axis in axes)
    described = ", ".join(
        f"{n} {a.dtype}{list(a.shape)}" for n, a in (("x", x), ("rows", rows), ("counts", counts))
    )
    right = (jnp.uint32, jnp.int32, jnp.int32) == tuple(a.dtype for a in (x, rows, counts)) and x.ndim == 2
    if not right or rows.ndim != 2 or len(rows) != p or counts.shape != (p,) or 0 in (*x.shape, *rows.shape):
        raise ValueError(
            f"peer_exchange: {described} over {p} devices of {axes}; expected uint32[N, W], int32[{p}, M], int32[{p}]"
        )

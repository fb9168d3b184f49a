"""One ragged all-to-all: chunks of rows of any size between the devices of a mesh axis, with its reverse as backward.

Native where XLA has it (GPU, TPU), emulated exactly where it has not (CPU); which of the two is decided when the
program is lowered. Runs inside `shard_map`.

Dims: c chunk, per device as many to each peer, in the order of the peers; p device; s row sent, r row received.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Axis = str | tuple[str, ...]
IMPLEMENTATIONS = (None, "native", "dense")


class Chunks(NamedTuple):
    """Chunks of rows, as many to each peer, in the order of the peers; int32 [c] each."""

    start: jax.Array  # of my chunk in my rows
    size: jax.Array
    landing: jax.Array  # where it lands at its peer
    recv_start: jax.Array  # where the peer's chunk lands here
    recv_size: jax.Array
    recv_origin: jax.Array  # where it started at its peer

    def reverse(self) -> "Chunks":
        """The way back: what was received returns to where it came from."""
        return Chunks(self.recv_start, self.recv_size, self.recv_origin, self.start, self.size, self.landing)


def _native(x: jax.Array, chunks: Chunks, rows: int, axis: Axis) -> jax.Array:
    out = jnp.zeros((rows, *x.shape[1:]), x.dtype)
    c = chunks
    return lax.ragged_all_to_all(x, out, c.start, c.size, c.landing, c.recv_size, axis_name=axis)


def _dense(x: jax.Array, chunks: Chunks, rows: int, axis: Axis, most: int) -> jax.Array:
    """Chunks padded to `most` rows, a dense all-to-all, and a scatter of what is real."""
    i = jnp.arange(most)[None]
    source = jnp.where(i < chunks.size[:, None], chunks.start[:, None] + i, x.shape[0])
    sent = x.at[source].get(mode="fill", fill_value=0)
    got = lax.all_to_all(sent, axis, 0, 0, tiled=True)
    target = jnp.where(i < chunks.recv_size[:, None], chunks.recv_start[:, None] + i, rows)
    out = jnp.zeros((rows, *x.shape[1:]), x.dtype)
    return out.at[target.reshape(-1)].set(got.reshape(-1, *x.shape[1:]), mode="drop")


def _ragged(
    x: jax.Array, chunks: Chunks, rows: int, most: int, axis: Axis, implementation: str | None
) -> jax.Array:
    native = functools.partial(_native, rows=rows, axis=axis)
    dense = functools.partial(_dense, rows=rows, axis=axis, most=most)
    if implementation is None:
        return lax.platform_dependent(x, chunks, cpu=dense, default=native)
    return (native if implementation == "native" else dense)(x, chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def ragged_all_to_all(
    x: jax.Array, chunks: Chunks, rows: int, most: int, axis: Axis, implementation: str | None = None
) -> jax.Array:
    """Rows [s, ...] to the peers of `axis` -> rows received [rows, ...], zero where none landed.

    `most`: no chunk has more rows (the emulation's padding). Backward: the same with `chunks.reverse()`.
    """
    return _ragged(x, chunks, rows, most, axis, implementation)


def _ragged_fwd(x, chunks, rows, most, axis, implementation):  # type: ignore[no-untyped-def]
    return _ragged(x, chunks, rows, most, axis, implementation), (chunks, x.shape[0])


def _ragged_bwd(rows, most, axis, implementation, saved, g):  # type: ignore[no-untyped-def]
    chunks, sent = saved
    return _ragged(g, chunks.reverse(), sent, most, axis, implementation), None


ragged_all_to_all.defvjp(_ragged_fwd, _ragged_bwd)


# --- chunks from counts ---------------------------------------------------------------------------------------


def before(x: jax.Array, dim: int) -> jax.Array:
    """Sum of the entries before each one."""
    return jnp.cumsum(x, dim) - x


def make_chunks(counts_pc: jax.Array, axis: Axis, stride: int = 0) -> Chunks:
    """Chunks of this device from everybody's counts (`counts_pc[q]`: rows of device q's chunks).

    What lands at a device lies chunk by chunk, `stride` rows apart, and within a chunk in the order of the senders.
    """
    p, c = counts_pc.shape
    per = c // p
    start_pc = before(counts_pc, 1)
    landing_pc = before(counts_pc, 0) + stride * (jnp.arange(c, dtype=jnp.int32) % per)[None]
    me = lax.axis_index(axis)

    def mine(x_pc):
        return lax.dynamic_slice_in_dim(x_pc, me * per, per, 1).reshape(-1)

    sent = (start_pc[me], counts_pc[me], landing_pc[me])
    return Chunks(*sent, mine(landing_pc), mine(counts_pc), mine(start_pc))

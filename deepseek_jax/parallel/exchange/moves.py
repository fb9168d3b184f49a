"""Weights of experts go from the slots of one plan to those of the next.

A slot is a place for one expert; the device j of those that hold experts has slots j * n ... (j + 1) * n - 1. A layer's new
slots are filled by one ragged all-to-all for each array, of one row, an expert, for each slot: what stays on its device is copied
there, and what comes from elsewhere travels once. XLA for CPUs, which has no ragged collective, sends every device as many rows
as there are slots, most of them zeros.

Runs inside `shard_map` (check_vma=False). Bits travel, whatever the dtype: a move changes none.

Dims: s slot of this device, p slot of all devices, c chunk: of device q, the rows for its slots.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.exchange.dispatcher import FLAT
from deepseek_jax.parallel.exchange.order import after
from deepseek_jax.parallel.exchange.ragged import Chunks, ragged_all_to_all

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _chunks(source_p: jax.Array, new: int, old: int) -> Chunks:
    """A row for each of `new` slots of each device, or none; `old` slots of each device hold rows now."""
    me = lax.axis_index(FLAT[0])
    slot_c = jnp.tile(jnp.arange(new, dtype=jnp.int32), len(source_p) // new)
    device_c = jnp.arange(len(source_p), dtype=jnp.int32) // new
    mine_s = lax.dynamic_slice_in_dim(source_p, me * new, new)
    mine_c = jnp.tile(mine_s, len(source_p) // new)
    return Chunks(
        start=source_p % old,
        size=(source_p // old == me).astype(jnp.int32),
        landing=slot_c,
        recv_start=slot_c,
        recv_size=(mine_c // old == device_c).astype(jnp.int32),
        recv_origin=mine_c % old,
    )


def moved(tree: Any, source_p: jax.Array, new: int, implementation: str | None = None) -> Any:
    """Arrays [s, ...] of this device's slots -> those of its `new` slots, [new, ...], slot i of device j filled from
    source_p[j * new + i]."""
    leaves, structure = jax.tree.flatten(tree)
    chunks, done = None, None
    out = []
    for x in leaves:
        chunks = _chunks(source_p, new, len(x)) if chunks is None else chunks
        bits = lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
        if done is not None:
            bits = after(bits, done)  # on CPUs, one collective behind the other
        done = ragged_all_to_all(bits, chunks, new, 1, FLAT[0], implementation)
        out.append(lax.bitcast_convert_type(done, x.dtype))
    return jax.tree.unflatten(structure, out)

"""Layers on their way between where they are kept, all of a kind stacked, and the slots of the ranks that hold them.

Every function runs inside `shard_map`, for one array whose leading dim is the layer, or the slot. `table`, int32
[rank, slot] of NumPy, is that of `Held.layers`: the layer in each slot, -1 in an empty one, every layer in as many slots
as any other. Each pair is one map and its transpose.

Dims: l layer, k slot, r rank.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.parallel.mesh import PIPE


def _taken(x: jax.Array, index: jax.Array | np.ndarray) -> jax.Array:
    """x[index], zeros where the index is none of x."""
    return jnp.take(x, jnp.where(index < 0, len(x), index), axis=0, mode="fill", fill_value=0)


def _places(table: np.ndarray) -> np.ndarray:
    """int32 [l, copies]: in which of all slots, rank by rank, the copies of a layer are."""
    order = np.argsort(table, axis=None, kind="stable")
    filled = order[np.count_nonzero(table < 0) :]
    places = filled.reshape(table.max() + 1, -1)
    assert (table.reshape(-1)[places] == np.arange(len(places))[:, None]).all(), (
        "layers in unequally many slots"
    )
    return places


def select(x: jax.Array, table: np.ndarray) -> jax.Array:
    """x [l, ...] -> this rank's layers of it [k, ...], zeros in empty slots; nothing travels."""
    return _taken(x, jnp.asarray(table)[lax.axis_index(PIPE)])


def place(g: jax.Array, table: np.ndarray) -> jax.Array:
    """g [k, ...] -> [l, ...]: zeros for layers that this rank does not hold. Summed over `pipe`: all of them."""
    slot_rl = np.full((len(table), table.max() + 1), -1, np.int32)
    rank, slot = np.nonzero(table >= 0)
    slot_rl[rank, table[rank, slot]] = slot
    return _taken(g, jnp.asarray(slot_rl)[lax.axis_index(PIPE)])


def fetch(x: jax.Array, table: np.ndarray, dim: int) -> jax.Array:
    """x [l, ...], of which this rank has a part along `dim` -> its own layers [k, ...], whole along `dim`.

    One exchange: each rank sends its part of every layer to the ranks that hold it, zeros for their empty slots.
    """
    return lax.all_to_all(_taken(x, table.reshape(-1)), PIPE, split_axis=0, concat_axis=dim, tiled=True)


def send_back(g: jax.Array, table: np.ndarray, dim: int) -> jax.Array:
    """g [k, ...] -> the sum over each layer's copies [l, ...], this rank's part along `dim`."""
    parts = lax.all_to_all(g, PIPE, split_axis=dim, concat_axis=0, tiled=True)
    return functools.reduce(operator.add, (jnp.take(parts, at, axis=0) for at in _places(table).T))

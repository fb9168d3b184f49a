"""Lays out rows sorted by group (expert), and tells which group each tile of a kernel belongs to.

The grouped GEMMs follow DeepGEMM's convention: the rows of a group are contiguous, each segment starts at a multiple of
`alignment` (128), and rows that only fill up a segment, or lie behind the last one, carry the id -1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BLOCK

PADDING = -1


class Groups(NamedTuple):
    """`group_m` int32 [m] is the group of each row, -1 for padding; `sizes_e` [e] counts each group's rows without it."""

    group_m: jax.Array
    sizes_e: jax.Array


class Masked(Groups):
    """Groups that all have the same room, whatever their sizes: the first rows of each are present."""

    @property
    def room(self) -> int:
        return self.group_m.shape[0] // self.sizes_e.shape[0]


def aligned_sizes(group_sizes: jax.Array, alignment: int = BLOCK) -> jax.Array:
    """Returns how many rows each group occupies with its padding."""
    return (group_sizes + alignment - 1) // alignment * alignment


def row_groups(group_sizes: jax.Array, num_rows: int, alignment: int = BLOCK) -> jax.Array:
    """Returns the group of each of `num_rows` rows, int32, -1 for padding, from group_sizes [G].

    Rows of groups that do not fit into `num_rows` are cut off: the caller provides enough room, at most
    `sum(sizes) + G * (alignment - 1)` rows.
    """
    occupied = aligned_sizes(group_sizes, alignment)
    ends = jnp.cumsum(occupied)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    group = jnp.searchsorted(ends, row, side="right", method="compare_all").astype(jnp.int32)
    inside = jnp.minimum(group, group_sizes.shape[0] - 1)
    real = row - (ends - occupied)[inside] < group_sizes[inside]
    return jnp.where((group < group_sizes.shape[0]) & real, group, PADDING)


def tile_groups(group_ids: jax.Array, tile: int) -> jax.Array:
    """Returns the group of each tile of rows, -1 where it is all padding: [M] -> [M / tile]."""
    return jnp.max(group_ids.reshape(-1, tile), axis=1)


class RowTiles(NamedTuple):
    """The tiles of rows of a grouped product, int32: group [tiles], -1 for one of nothing but padding. With `tile` and
    `present` [1] only the first `present` are visited: the i-th is tile[i], of group[i]."""

    group: jax.Array
    tile: jax.Array | None = None
    present: jax.Array | None = None


def masked_groups(rows_g: jax.Array, room: int) -> jax.Array:
    """Returns the group of each row [G * room] where every group has `room` rows, of which the first rows_g[g] are present,
    -1 for an absent one."""
    row = jnp.arange(room, dtype=jnp.int32)[None]
    group = jnp.arange(rows_g.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(row < rows_g[:, None], group, PADDING).reshape(-1)


def present_tiles(rows_g: jax.Array, room: int, tile: int) -> RowTiles:
    """Returns the tiles that hold a present row of `masked_groups`; `room` is a multiple of `tile`."""
    num_groups, each = rows_g.shape[0], room // tile
    tiles_g = jnp.clip((rows_g + tile - 1) // tile, 0, each)
    ends = jnp.cumsum(tiles_g)
    i = jnp.arange(num_groups * each, dtype=jnp.int32)
    group = jnp.searchsorted(ends, i, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    return RowTiles(group, group * each + i - (ends - tiles_g)[group], ends[-1:])


def check_rows(op: str, rows: int, group_ids: jax.Array, alignment: int) -> None:
    """Raises ValueError unless `group_ids` fits an operand of `rows` rows."""
    if group_ids.shape != (rows,) or group_ids.dtype != jnp.int32:
        raise ValueError(
            f"{op}: group_ids is {group_ids.dtype}{list(group_ids.shape)}; expected int32[{rows}]"
        )
    if alignment < 1 or rows % alignment:
        raise ValueError(
            f"{op}: {rows} rows are no multiple of alignment={alignment}; pad the last segment with id -1"
        )


def check_sizes(op: str, length: int, group_sizes: jax.Array, alignment: int) -> None:
    """Raises ValueError unless `group_sizes` is a vector of counts for a contraction of `length`."""
    if group_sizes.ndim != 1 or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"{op}: group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}; expected int32[G]"
        )
    if alignment < 1 or length % alignment:
        raise ValueError(f"{op}: the contraction of {length} is no multiple of alignment={alignment}; pad it")

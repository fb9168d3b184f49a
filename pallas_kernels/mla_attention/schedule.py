"""Decides which blocks of keys a block of queries visits, and in what order thread blocks take the blocks.

Legend: B batch, T queries, S keys, bq x bk the block of queries x keys that one step handles.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.blocks import cdiv

# Heads whose blocks run side by side. 132 SMs then work on about 8 blocks of each, which read the same keys at about the
# same time: once from memory, the other times from the L2 cache.
HEADS_TOGETHER = 16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Which pairs of a block of queries and a block of keys are visible: `some` pair of tokens, `every` one.

    Both are bool [B, ceil(T / bq), ceil(S / bk)], B of 1 where all sequences are alike.
    """

    some: Any
    every: Any

    @classmethod
    def of(
        cls,
        lengths: tuple[int, int],
        block: tuple[int, int],
        segments: jax.Array | None,
        q_offset: jax.Array | None,
    ) -> "Blocks":
        """Finds them for `lengths` (T, S) in blocks (bq, bk); `some` may hold too much where ids come in no order."""
        (queries, keys), (bq, bk) = lengths, block
        # Known beforehand without segments and offset: constants of the program.
        xp: Any = np if segments is None and q_offset is None else jnp
        offset = xp.zeros(1, np.int32) if q_offset is None else q_offset
        first_q = offset[:, None, None] + xp.arange(cdiv(queries, bq), dtype=np.int32)[None, :, None] * bq
        first_k = xp.arange(cdiv(keys, bk), dtype=np.int32)[None, None] * bk
        last_k = first_k + bk - 1
        some = first_k <= first_q + bq - 1
        every = (last_k <= first_q) & (last_k < keys)
        if segments is not None:
            (q_min, q_max), (k_min, k_max) = _range(segments, bq), _range(segments, bk)
            q_min, q_max = q_min[:, :, None], q_max[:, :, None]
            k_min, k_max = k_min[:, None], k_max[:, None]
            some = some & (q_min <= k_max) & (k_min <= q_max)
            every = every & (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
        return cls(some, every)

    @property
    def spans(self) -> jax.Array:
        """Returns what each block of queries visits: int32 [B, ceil(T / bq), 4], blocks of keys first <= i < end, at
        least one, of which full_first <= i < full_end need no mask."""
        return _spans(self.some, self.every)

    @property
    def transposed_spans(self) -> jax.Array:
        """Returns what each block of keys is visited by: int32 [B, ceil(S / bk), 4]."""
        return _spans(self.some.swapaxes(1, 2), self.every.swapaxes(1, 2))


def _range(segments: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the greatest id of each block: [B, T] -> two of [B, ceil(T / block)]."""
    tail = -segments.shape[1] % block
    by_block = jnp.pad(segments, ((0, 0), (0, tail)), mode="edge").reshape(segments.shape[0], -1, block)
    return by_block.min(-1), by_block.max(-1)


def _spans(some: Any, every: Any) -> jax.Array:
    xp: Any = np if isinstance(some, np.ndarray) else jnp
    n = some.shape[-1]
    first = xp.argmax(some, -1)
    end = xp.where(some.any(-1), n - xp.argmax(some[..., ::-1], -1), first + 1)
    full_first = xp.argmax(every, -1)
    ended = (xp.arange(n)[None, None] >= full_first[..., None]) & ~every
    full_end = xp.where(ended.any(-1), xp.argmax(ended, -1), n)
    return jnp.asarray(xp.stack([first, full_first, full_end, end], -1), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of all tiles: groups of heads; within a group all tiles of one rank (the longest first), heads in turn.

    Attributes:
      heads: B * H of them.
      ranks: tiles of each head.
      longest_last: whether the tile with the most steps has the highest index, as with causal queries.
    """

    heads: int
    ranks: int
    longest_last: bool

    @property
    def tiles(self) -> int:
        return self.heads * self.ranks

    @property
    def together(self) -> int:
        """Heads of a group."""
        return max(n for n in range(1, HEADS_TOGETHER + 1) if self.heads % n == 0)

    def tile(self, place: Any) -> tuple[Any, Any]:
        """Returns (head, index) of the tile at a place of the order."""
        size = self.together * self.ranks
        group, within = lax.div(place, size), lax.rem(place, size)
        rank, member = lax.div(within, self.together), lax.rem(within, self.together)
        return group * self.together + member, (self.ranks - 1 - rank if self.longest_last else rank)

    def rounds(self, block: jax.Array, blocks: int) -> jax.Array:
        """Returns how many tiles thread block `block` of `blocks` takes."""
        full = self.tiles // blocks
        return lax.select(self.place(jnp.int32(full), block, blocks) < self.tiles, full + 1, full)

    def place(self, turn: jax.Array, block: jax.Array, blocks: int) -> jax.Array:
        """Returns the place that a thread block takes in a round. Rounds run there and back again where tiles only get
        shorter, one group; with several, places come anyhow, and back again would meet the same lengths."""
        if self.together < self.heads:
            return turn * blocks + block
        return turn * blocks + lax.select(lax.rem(turn, 2) == 0, block, blocks - 1 - block)

"""What the attention kernels have in common: thread blocks of one warpgroup that loads by TMA and two that multiply.

The loading warpgroup fills rings of slots in shared memory. The multiplying ones take turns at the tensor core: while one
computes its exponentials, the other's products run (the "ping-pong" of FlashAttention-3).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import compiler_params, swizzled
from pallas_kernels.mla_attention.schedule import Order

CONSUMERS = 2
ROWS = 64  # of a tile, per consumer: one wgmma high
TILE = CONSUMERS * ROWS
PANEL = 64  # columns of one 128-byte swizzle
LOG2E = 1.4426950408889634
# Registers per thread: 128 * (24 + 2 * 240) of the 65,536 that there are.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240


def ring(stages: int, *shapes: tuple[int, ...]) -> tuple:
    """Returns the types of a `Ring` of `stages` slots: buffers of `shapes`, BF16 if they are matrices and else float32."""
    buffers = tuple(
        plgpu.SMEM((stages, *shape), jnp.bfloat16, transforms=swizzled(jnp.bfloat16, PANEL))
        if len(shape) > 1
        else plgpu.SMEM((stages, *shape), jnp.float32)
        for shape in shapes
    )
    full = plgpu.Barrier(num_arrivals=len(shapes), num_barriers=stages)
    return (*buffers, full, plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages))


class Ring:
    """Slots of shared memory that the producer fills in turn and both consumers read."""

    def __init__(self, refs: tuple):
        *self.buffers, self.full, self.free = refs
        self.stages = self.buffers[0].shape[0]

    def open(self) -> None:
        """Says, as a consumer at the start, that all slots are free."""
        for slot in range(self.stages):
            plgpu.barrier_arrive(self.free.at[slot])

    def fill(self, count: jax.Array, *sources: Any) -> None:
        """Loads a slice of global memory into each buffer; `count` numbers the fills of this ring."""
        slot = lax.rem(count, self.stages)
        plgpu.barrier_wait(self.free.at[slot])
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

    def take(self, count: jax.Array) -> list[Any]:
        """Waits for a fill; returns its references."""
        plgpu.barrier_wait(self.full.at[lax.rem(count, self.stages)])
        return self.held(count)

    def held(self, count: jax.Array) -> list[Any]:
        """Returns the references of a fill that has been taken and not released."""
        return [buffer.at[lax.rem(count, self.stages)] for buffer in self.buffers]

    def release(self, count: jax.Array) -> None:
        """Says that this consumer has read a fill to the end."""
        plgpu.barrier_arrive(self.free.at[lax.rem(count, self.stages)])

    def drain(self) -> None:
        """Waits, as the producer at the end, until all has been read."""
        for slot in range(self.stages):
            plgpu.barrier_wait(self.free.at[slot])


class Turns:
    """Lets the consumers use the tensor core by turns. Both must take as many turns."""

    TYPE = plgpu.Barrier(num_arrivals=1, num_barriers=CONSUMERS)

    def __init__(self, barriers: Any):
        self.barriers, self.wg = barriers, lax.axis_index("wg")

    def begin(self) -> None:
        """The second consumer gives the first turn to the first."""
        pl.when(self.wg == 1)(self.give)

    def take(self) -> None:
        plgpu.barrier_wait(self.barriers.at[self.wg])

    def give(self) -> None:
        plgpu.barrier_arrive(self.barriers.at[1 - self.wg])

    def end(self) -> None:
        """The last turn that was given is nobody's."""
        pl.when(self.wg == 0)(self.take)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile's head (of B * H), its block of rows, and the blocks that it visits: first <= i < end, those with
    full_first <= i < full_end without a mask. `count` numbers the tiles of a thread block, `step` the visits before it."""

    head: Any
    index: Any
    batch: Any
    first: Any
    full_first: Any
    full_end: Any
    end: Any
    count: Any
    step: Any

    @property
    def visits(self) -> Any:
        return self.end - self.first

    @property
    def rows(self) -> Any:
        return pl.ds(self.index * TILE, TILE)

    @property
    def own_rows(self) -> Any:
        """The rows of the calling consumer."""
        return pl.ds(self.index * TILE + lax.axis_index("wg") * ROWS, ROWS)

    def masked(self, i: Any) -> Any:
        return (i < self.full_first) | (i >= self.full_end)


def own_rows() -> Any:
    """Returns which rows of a tile in shared memory are the calling consumer's."""
    return pl.ds(lax.axis_index("wg") * ROWS, ROWS)


def for_each_tile(
    order: Order, spans_ref: Any, blocks: int, heads: int, body: Callable[[Tile], None]
) -> None:
    """Runs `body` on each tile of this thread block. `spans_ref` is int32 [B or 1, tiles of a head, 4]."""
    block = lax.axis_index("sm")

    def run(count, step):
        head, index = order.tile(order.place(count, block, blocks))
        batch = lax.div(head, heads)
        row = batch if spans_ref.shape[0] > 1 else 0
        first, full_first, full_end, end = (spans_ref[row, index, i] for i in range(4))
        tile = Tile(head, index, batch, first, full_first, full_end, end, count, step)
        body(tile)
        return step + tile.visits

    lax.fori_loop(0, order.rounds(block, blocks), run, jnp.int32(0))


def stream(tile: Tile, block: int, *streams: tuple[Ring, Sequence[Any]]) -> None:
    """Fills each ring, visit by visit, with `block` rows of its references [B * H, rows, ...], of the tile's head."""

    @pl.loop(0, tile.visits)
    def _(i):
        rows = pl.ds((tile.first + i) * block, block)
        for into, refs in streams:
            into.fill(tile.step + i, *(ref.at[tile.head, rows] for ref in refs))


def launch(
    body: Callable, out_type: Any, scratch_types: Sequence[Any], blocks: int, **options: Any
) -> Callable:
    """Returns the kernel of so many thread blocks; `options` are the compiler's."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=compiler_params(approx_math=True, **options),
    )


def run_specialised(
    tiles: Callable[[Callable[[Tile], None]], None],
    load: Callable[[Tile], None],
    compute: Callable[[Tile], None],
    rings: Sequence[Ring],
    turns: Turns,
) -> None:
    """Runs `compute` on all tiles in the first two warpgroups, and `load`, which fills `rings` for them, in the third."""

    @pl.when(lax.axis_index("wg") < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        for each in rings:
            each.open()
        turns.begin()
        tiles(compute)
        turns.end()
        plgpu.wait_smem_to_gmem(0)

    @pl.when(lax.axis_index("wg") == CONSUMERS)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        tiles(load)
        for each in rings:
            each.drain()


def along_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts one value per row."""
    return lax.broadcast_in_dim(x, shape, (0,))


def along_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts one value per column."""
    return lax.broadcast_in_dim(x, shape, (1,))


STAGING = plgpu.SMEM((CONSUMERS, ROWS, PANEL), jnp.bfloat16, transforms=swizzled(jnp.bfloat16, PANEL))


def store(acc: jax.Array, staging: Any, out_ref: Any) -> None:
    """Writes this consumer's rows [64, n] to global memory in BF16, through its part of `staging`, a panel at a time."""
    buffer = staging.at[lax.axis_index("wg")]
    for column in range(0, acc.shape[1], PANEL):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous panel has been read
        buffer[...] = acc[:, column : column + PANEL].astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_ref.at[:, pl.ds(column, PANEL)])

"""A ring of shared-memory slots: one warpgroup fills them by TMA, the others multiply what is in them, step after step.

The ring does not know where one output tile ends and the next begins. Steps are counted over all tiles of a thread
block, so the slots are filled for the next tile while the present one is finished and stored: nothing drains between
tiles. A slot is filled again once all that read it have released it, in every thread block that shares an operand.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots and barriers, as references inside of a kernel.

    Attributes:
      specs: block of each operand in one step; its `index_map` takes the step, its `collective_axes` name the cluster whose
        thread blocks share it.
      stages: number of slots.
      buffers: [stages, *block] of each operand.
      filled: a barrier per slot that completes when all its operands have arrived.
      released: a barrier per slot that completes when all readers have read it.
    """

    specs: Sequence[Any]
    stages: int
    buffers: Sequence[Any]
    filled: Any
    released: Any

    @staticmethod
    def scratch(specs: Sequence[Any], dtypes: Sequence[Any], stages: int, readers: int) -> list[Any]:
        """Returns what the kernel allocates: `buffers`, `filled` and `released`, for so many reading warpgroups."""
        shared = {axis for spec in specs for axis in spec.collective_axes or ()}
        barrier: dict[str, Any] = {"num_arrivals": readers, "num_barriers": stages}
        return [
            *(
                plgpu.SMEM((stages, *spec.block_shape), dtype, transforms=spec.transforms)
                for spec, dtype in zip(specs, dtypes, strict=True)
            ),
            plgpu.Barrier(num_arrivals=len(specs), num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=tuple(shared), **barrier)
            if shared
            else plgpu.Barrier(**barrier),
        ]

    def fill(self, views: Sequence[Any], k: Any, count: Any) -> None:
        """Starts loading step `k` of `views`, the `count`-th of all, when its slot is free."""
        slot = lax.rem(count, self.stages)
        pl.when(count >= self.stages)(lambda: plgpu.barrier_wait(self.released.at[slot]))
        for spec, view, buffer in zip(self.specs, views, self.buffers, strict=True):
            block = (
                pl.ds(i * size, size) for i, size in zip(spec.index_map(k), spec.block_shape, strict=True)
            )
            plgpu.copy_gmem_to_smem(
                view.at[tuple(block)],
                buffer.at[slot],
                self.filled.at[slot],
                collective_axes=spec.collective_axes or None,
            )

    def take(self, count: Any) -> list[Any]:
        """Returns the operands of the `count`-th step, once they are there."""
        slot = lax.rem(count, self.stages)
        plgpu.barrier_wait(self.filled.at[slot])
        return [buffer.at[slot] for buffer in self.buffers]

    def release(self, count: Any) -> None:
        """Says that this warpgroup has read the `count`-th step."""
        plgpu.barrier_arrive(self.released.at[lax.rem(count, self.stages)])

    def drain(self, count: jax.Array) -> None:
        """Waits until all of `count` steps are read: nobody may leave while a neighbour still arrives at its barriers."""

        def wait(step: jax.Array, _: None) -> None:
            plgpu.barrier_wait(self.released.at[lax.rem(step, self.stages)])

        lax.fori_loop(lax.max(count - self.stages, jnp.int32(0)), count, wait, None)

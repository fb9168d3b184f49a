"""The exchange as a kernel: a thread block copies rows for one peer, memory to shared memory to the peer's memory.

Several thread blocks serve each peer, in turns of rows. A row is read by TMA while those before it are written by TMA, over
NVLink. A thread block whose rows have all arrived adds 1 to the peer's semaphore; the kernel of a device ends when all
thread blocks of all devices have done so for it. That the semaphores are zero, and the buffers there, is XLA's to see to:
a kernel that uses peers' memory begins when all devices have come to it.

Dims: n row of this device, w word, p peer, m place.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import pad_last2
from pallas_kernels.compat import JAX_VERSION, compiler_params

CHANNELS = 4  # thread blocks per peer
STAGES = 6  # rows in the shared memory of each
WORDS = 4  # a row is copied 16 bytes at a time
SHARED_BYTES = 229_376


def unsupported(axis: tuple[str, ...]) -> str | None:
    """Says why the kernel cannot run here, or None."""
    if JAX_VERSION < (0, 12):
        return "jax before 0.12 gives a kernel no addresses in other devices' memory"
    others = {
        name: n for name, n in jax.sharding.get_abstract_mesh().shape.items() if n > 1 and name not in axis
    }
    return f"the mesh has other axes, {others}: not all of its devices are peers" if others else None


@dataclasses.dataclass(frozen=True)
class Peers:
    """The devices of some mesh axes, to a kernel that runs on each of them."""

    axis: tuple[str, ...]

    def me(self) -> jax.Array:
        return lax.axis_index(self.axis)

    def mine(self, ref: Any) -> Any:
        """My array."""
        return ref

    def of(self, ref: Any, peer: Any) -> Any:
        """A peer's array."""
        return plgpu.remote_ref(ref, {self.axis: peer})  # type: ignore[arg-type]

    def semaphore(self) -> Any:
        """The one that all thread blocks of a device share; a scratch would be a thread block's own. Each call allocates."""
        return pl.get_global(plgpu.SemaphoreType.REGULAR)

    def say(self, arrived: Any, peer: Any) -> None:
        """Tells a peer that what this thread block wrote there has arrived."""
        pl.semaphore_signal(arrived, 1, device_id={self.axis: peer})  # type: ignore[dict-item]

    def hear(self, arrived: Any, times: int) -> None:
        """Waits until this device was told so many times."""
        pl.semaphore_wait(arrived, times)


def exchange(peers: Peers, x, rows, counts, out, received, buffer, loaded) -> None:
    """What a thread block does with its references; buffer [stages, w] and a barrier per stage are its own."""
    p, stages = counts.shape[-1], buffer.shape[0]
    x, rows, counts = (peers.mine(ref) for ref in (x, rows, counts))
    me, block = peers.me(), lax.axis_index("block")
    peer, channel = lax.rem(block, p), lax.div(block, p)
    there, arrived = peers.of(out, peer), peers.semaphore()
    turns = lax.div(counts[peer] - channel + CHANNELS - 1, CHANNELS)

    def load(i: Any) -> None:
        row, slot = rows[peer, channel + i * CHANNELS], lax.rem(i, stages)
        plgpu.copy_gmem_to_smem(
            x.at[row], buffer.at[slot], loaded.at[slot], oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        )

    def pass_on(i: jax.Array, _: None) -> None:
        slot = lax.rem(i, stages)
        plgpu.barrier_wait(loaded.at[slot])
        plgpu.copy_smem_to_gmem(buffer.at[slot], there.at[me, channel + i * CHANNELS])
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the row before has left its slot
        pl.when(i + stages - 1 < turns)(functools.partial(load, i + stages - 1))

    for i in range(stages - 1):
        pl.when(i < turns)(functools.partial(load, jnp.int32(i)))
    lax.fori_loop(0, turns, pass_on, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    @pl.when(channel == 0)
    def _():
        peers.of(received, peer)[me] = counts[peer]

    peers.say(arrived, peer)
    pl.when(block == 0)(lambda: peers.hear(arrived, p * CHANNELS))


@functools.partial(jax.jit, static_argnames=("axis",))
def peer_exchange(x, rows, counts, *, axis: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """x [N, W], rows [P, M], counts [P] -> ([P, M, W], [P]). Rows are padded to 16 bytes."""
    words, (p, m) = x.shape[1], rows.shape
    x = pad_last2(x, (1, WORDS))
    stages = max(2, min(STAGES, SHARED_BYTES // (4 * x.shape[1])))
    out, received = plgpu.kernel(
        functools.partial(exchange, Peers(axis)),
        out_type=(
            jax.ShapeDtypeStruct((p, m, x.shape[1]), jnp.uint32),
            jax.ShapeDtypeStruct((p,), jnp.int32),
        ),
        grid=(p * CHANNELS,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((stages, x.shape[1]), jnp.uint32),
            plgpu.Barrier(num_barriers=stages),
        ],
        compiler_params=compiler_params(),
    )(x, rows, counts)
    return out[..., :words], received

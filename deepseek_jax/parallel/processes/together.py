"""What the processes of a run do together: feed a batch, decide, look at global arrays.

Every process runs the same program on the same global arrays and holds only its own shards of them. Decisions that
depend on what one process sees, a signal or a file, are taken together, because a process that leaves the common
order of collectives hangs all others. With one process, nothing here communicates.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.parallel.mesh import BATCH_AXES, replicated


def is_first() -> bool:
    """Whether this is the process that writes records and talks to the user."""
    return jax.process_index() == 0


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process feeds part i of the n equal parts of every batch.

    Processes that differ only along axes that do not divide the batch (pipe, tensor) feed the same part.

    Raises:
        ValueError: a process without devices in the mesh, or whose devices hold no contiguous, equal part.
    """
    dims = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    rows = np.moveaxis(mesh.devices, dims, range(len(dims)))
    rows = rows.reshape(-1, mesh.size // np.prod([mesh.devices.shape[d] for d in dims], dtype=int))
    parts = {
        p: [i for i, row in enumerate(rows) if any(d.process_index == p for d in row)] for p in _processes()
    }
    sizes = {len(part) for part in parts.values()}
    for process, part in parts.items():
        contiguous = part and part[-1] - part[0] + 1 == len(part) and part[0] % len(part) == 0
        if not contiguous or len(sizes) != 1 or len(rows) % len(part):
            raise ValueError(
                f"process {process} holds the parts {part} of the {len(rows)} into which mesh "
                f"{dict(mesh.shape)} divides a batch; each process must hold equally many that follow each other: "
                f"use all devices, equally many per process, and change mesh.*"
            )
    mine = parts[jax.process_index()]
    return mine[0] // len(mine), len(rows) // len(mine)


def _processes() -> range:
    return range(jax.process_count())


class StopVote:
    """Whether any process wants to stop; all learn it in the same call.

    The answer comes one call later, so that nothing waits for the devices: asked once per step, it costs one
    collective over a byte per device, queued behind the step. With one process, the answer is the wish.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))
        self._asked: jax.Array | None = None

    def __call__(self, wish: bool) -> bool:
        """The answer to the call before (False at the first); `wish`: this process wants to stop."""
        if jax.process_count() == 1:
            return wish
        size = self._sharding.mesh.size
        wishes = jax.make_array_from_callback((size,), self._sharding, lambda _: np.array([wish]))
        before, self._asked = self._asked, self._any(wishes)
        return before is not None and bool(before)


def from_first(number: int) -> int:
    """Process 0's `number` (int32), on all processes. They all must call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def lowest(number: int) -> int:
    """The smallest `number` (int32) of all processes, on all of them. They all must call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).min())


def of_each(x: np.ndarray) -> np.ndarray:
    """[process, ...]: what every process has, of the same shape, bit for bit. They all must call it."""
    if jax.process_count() == 1:
        return x[None]
    held = np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
    return np.asarray(multihost_utils.process_allgather(held)).view(x.dtype).reshape(-1, *x.shape)


def on_host(x: jax.Array) -> np.ndarray:
    """The whole of a global array in the memory of every process. They all must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def whole_copy(tree: Any, mesh: Mesh) -> Any:
    """`tree`, however it is sharded, as whole arrays on this process's first device. All processes must call it.

    Leaf by leaf: at any time, the other devices hold a copy of one leaf.
    """
    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    return jax.tree.map(lambda x: gather(x).addressable_data(0), tree)

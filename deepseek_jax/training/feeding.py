"""How batches reach the devices: as global arrays [b, w], sharded over the batch axes of the mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.parallel.mesh import batch_sharding, batch_shards
from deepseek_jax.parallel.processes.together import batch_share

Rows = Mapping[str, Any]  # NumPy's arrays


class Feed:
    """Of one mesh. share: (i, n), this process feeds part i of the n equal parts of every batch."""

    def __init__(self, mesh: Mesh):
        self.share = batch_share(mesh)
        self.shards = batch_shards(mesh)
        self._sharding = batch_sharding(mesh)

    def put(self, rows: Rows) -> dict[str, jax.Array]:
        """A batch, from this process's rows of it; what lies on the devices already stays as it is."""
        parts = self.share[1]
        return {
            name: x
            if isinstance(x, jax.Array)
            else jax.make_array_from_process_local_data(self._sharding, x, (len(x) * parts, *x.shape[1:]))
            for name, x in rows.items()
        }

    def put_whole(self, batch: Rows) -> dict[str, jax.Array]:
        """A batch that every process holds whole."""
        part, parts = self.share
        return self.put({name: np.split(x, parts)[part] for name, x in batch.items()})

    def filled_up(self, rows: Rows, batch_size: int) -> dict[str, np.ndarray]:
        """This process's rows during the ramp, each device's followed by empty ones up to a batch of `batch_size`."""
        parts = self.share[1]
        devices, room = self.shards // parts, batch_size // parts

        def one(x: np.ndarray) -> np.ndarray:
            of_each = x.reshape(devices, -1, *x.shape[1:])
            empty = room // devices - of_each.shape[1]
            return np.pad(of_each, ((0, 0), (0, empty), *((0, 0),) * (x.ndim - 1))).reshape(
                room, *x.shape[1:]
            )

        return {name: one(x) for name, x in rows.items()}

"""Device mesh and the one table that maps logical axes to mesh axes (report section 3.1-3.2).

Mesh axes: `pipe` (pipeline stages), `data` (replicas), `node` and `local` (expert parallelism spans both),
`tensor`. The batch is sharded over data, node and local. An axis of size 1 costs nothing.
"axis" is of the mesh, "dim" of a tensor.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import MeshConfig

AXES = ("pipe", "data", "node", "local", "tensor")
BATCH_AXES = ("data", "node", "local")


def make_mesh(cfg: MeshConfig, devices: Any = None) -> Mesh:
    """Mesh over `devices` (default: all); `data=0` takes whatever the other axes leave.

    Raises ValueError, with the numbers, if the axes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    rest = cfg.pipe * cfg.node * cfg.local * cfg.tensor
    data = cfg.data or max(1, len(devices) // rest)
    need = data * rest
    if need > len(devices) or (cfg.data == 0 and need != len(devices)):
        raise ValueError(
            f"mesh pipe={cfg.pipe} data={cfg.data} node={cfg.node} local={cfg.local} tensor={cfg.tensor} "
            f"needs {need} devices and {len(devices)} are at hand; change config.mesh.*"
        )
    shape = (cfg.pipe, data, cfg.node, cfg.local, cfg.tensor)
    return Mesh(np.array(devices[:need]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is divided."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dim over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))

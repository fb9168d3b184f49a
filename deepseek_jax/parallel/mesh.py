"""Device mesh and the one table that maps logical axes to mesh axes (report section 3.1-3.2).

Mesh axes: `pipe` (ranks of the pipeline), `data` (replicas), `node` and `local` (expert parallelism spans both),
`tensor` (heads inside the attention, the tokens of a sequence and experts outside of it). Sequences are sharded over
data, node and local, their tokens over `tensor`. An axis of size 1 costs nothing.
"axis" is of the mesh, "dim" of a tensor.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import MeshConfig
from deepseek_jax.model.params import Param, tree_map_with_name

PIPE = "pipe"
AXES = (PIPE, "data", "node", "local", "tensor")
BATCH_AXES = ("data", "node", "local")
TOKEN_AXES = (*BATCH_AXES, "tensor")  # a device's tokens differ from those of all others along these
STATE_AXES = (*TOKEN_AXES, PIPE)  # what may divide the state between steps: all, coarse to fine
EXPERT_AXES = ("node", "local", "tensor")

Rules = Mapping[str, tuple[str, ...]]
# Logical axis -> mesh axes that shard it, coarse to fine. What is not named is whole on every device.
TENSOR_PARALLEL: Rules = MappingProxyType({"heads": ("tensor",)})
EXPERT_PARALLEL: Rules = MappingProxyType({"expert": EXPERT_AXES, **TENSOR_PARALLEL})
# Of generation: decoding attends data parallel, each device with all heads.
WHOLE_ATTENTION: Rules = MappingProxyType({"expert": EXPERT_AXES})


def _sizes(cfg: MeshConfig, devices: int) -> tuple[int, ...]:
    """Size of each of AXES; `data=0` takes whatever the other axes leave of `devices`."""
    rest = cfg.pipe * cfg.node * cfg.local * cfg.tensor
    data = cfg.data or max(1, devices // rest)
    need = data * rest
    if need > devices or (cfg.data == 0 and need != devices):
        remainder = f", no multiple of {rest}" if need <= devices else ""
        raise ValueError(
            f"mesh pipe={cfg.pipe} data={cfg.data} node={cfg.node} local={cfg.local} tensor={cfg.tensor} "
            f"needs {need} devices and {devices} are at hand{remainder}; change config.mesh.*"
        )
    return cfg.pipe, data, cfg.node, cfg.local, cfg.tensor


def named_devices(cfg: MeshConfig) -> int:
    """Devices that a mesh config asks for at least: `data=0` counts as one."""
    return cfg.pipe * max(1, cfg.data) * cfg.node * cfg.local * cfg.tensor


def make_mesh(cfg: MeshConfig, devices: Any = None) -> Mesh:
    """Mesh over `devices` (default: all); `data=0` takes whatever the other axes leave.

    Raises ValueError, with the numbers, if the axes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _sizes(cfg, len(devices))
    need = math.prod(shape)
    return Mesh(np.array(devices[:need]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(cfg: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of `make_mesh` over as many devices, without any: for plans. Raises ValueError likewise."""
    return AbstractMesh(_sizes(cfg, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is divided."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Leading dim over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


# --- parameters -----------------------------------------------------------------------------------------------


def expert_exchange(cfg: MeshConfig, mesh: Mesh | AbstractMesh) -> str:
    """How experts are spread over the mesh: "two_hop", "flat" or "replicated"; `mesh.experts`, "auto" resolved."""
    nodes, inside = mesh.shape["node"], mesh.shape["local"] * mesh.shape["tensor"]
    if nodes * inside == 1:
        return "replicated"
    if cfg.experts != "auto":
        return cfg.experts
    return "two_hop" if nodes > 1 and inside > 1 else "flat"


def rules(cfg: MeshConfig, mesh: Mesh | AbstractMesh) -> Rules:
    """The table for a mesh config."""
    return TENSOR_PARALLEL if expert_exchange(cfg, mesh) == "replicated" else EXPERT_PARALLEL


def param_spec(name: str, param: Param, mesh: Mesh | AbstractMesh, table: Rules) -> PartitionSpec:
    """Mesh axes of each dim of a parameter.

    Raises ValueError if two dims want the same mesh axis, or a dim does not divide over its axes.
    """
    taken: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for logical, size in zip(param.axes, param.shape, strict=True):
        axes = tuple(a for a in table.get(logical or "", ()) if mesh.shape[a] > 1)
        for axis in axes:
            if axis in taken:
                raise ValueError(
                    f"{name} {param.shape}: its axes {taken[axis]!r} and {logical!r} are both mapped to the mesh "
                    f"axis {axis!r}; change one of them in the rules"
                )
            taken[axis] = str(logical)
        parts = math.prod(mesh.shape[a] for a in axes)
        if size % parts:
            raise ValueError(
                f"{name} {param.shape}: {size} of {logical!r} do not divide over {parts} devices of "
                + " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
                + f"; change config.mesh.{axes[-1]} or the model"
            )
        entries.append(axes or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def param_specs(tree: Any, mesh: Mesh | AbstractMesh, table: Rules) -> Any:
    """`param_spec` of each `Param` of a tree."""
    return tree_map_with_name(lambda name, p: param_spec(name, p, mesh, table), tree)


def spec_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes over which a spec shards."""
    return tuple(a for entry in spec if entry for a in ((entry,) if isinstance(entry, str) else entry))

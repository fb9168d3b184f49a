"""Lists in a compiled program what makes a host wait for its GPU while the program runs.

By XLA's public source (xla/backends/gpu/runtime: conditional_thunk.cc, while_thunk.cc, ragged_all_to_all_thunk.cc; flags as of
the versions in use) the host copies from the GPU, and waits for everything launched before it,

- at a conditional, its index: once;
- at a loop without a known length, its condition: once a turn, and once at the end;
- at a ragged all-to-all over several hosts, offsets and sizes: twice. Inside a host it is one kernel that writes into the
  peers' memory;
- at a callback to the host.

Branches and loops would be nodes of a CUDA graph if `xla_gpu_enable_command_buffer` said so, but not with an exchange in
them, which none of the graph's conditional nodes may hold. A wait costs the launch of what follows it, some 10 to 20 us of an
idle GPU, and no host runs ahead of it.
"""

import collections
import dataclasses
import math
import re

import numpy as np

from experiments.study.hlo_schedule import Instruction, computations

BRANCH, LOOP, RAGGED, CALLBACK = (
    "branch",
    "loop of unknown length",
    "ragged exchange over hosts",
    "callback",
)
_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Wait:
    """kind: BRANCH, LOOP, RAGGED or CALLBACK; op_name: where in the Python program it comes from."""

    kind: str
    op_name: str


def replica_groups(text: str) -> list[list[int]]:
    """The groups of devices of a collective: written out, as axes of a mesh, or as an iota."""
    if match := _GROUPS.search(text):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := _MESH.search(text):
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]), strict=True)
        dims = [names.index(name) for name in re.findall(r"'(\w+)'", match[2])]
        devices = np.arange(math.prod(map(int, sizes))).reshape([int(n) for n in sizes])
        groups = np.moveaxis(devices, dims, range(-len(dims), 0))
        return groups.reshape(-1, math.prod(int(sizes[i]) for i in dims)).tolist()
    if match := _IOTA.search(text):
        shape, dims = ([int(n) for n in match[i].split(",")] for i in (1, 2))
        order = [int(n) for n in match[3].split(",")] if match[3] else range(len(dims))
        return np.arange(np.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()
    return []


def over_hosts(text: str, per_host: int) -> bool:
    """Whether a collective is between hosts."""
    groups = replica_groups(text)
    return not groups or any(len({device // per_host for device in group}) > 1 for group in groups)


def _kind(x: Instruction, per_host: int) -> str | None:
    if x.opcode == "conditional":
        return BRANCH
    if x.opcode == "while" and '"known_trip_count"' not in x.text:
        return LOOP
    if x.opcode in ("ragged-all-to-all", "ragged-all-to-all-start") and over_hosts(x.text, per_host):
        return RAGGED
    if x.opcode in ("infeed", "outfeed") or "is_host_transfer=true" in x.text or "_callback" in x.text:
        return CALLBACK
    return None


def host_waits(program: str, per_host: int) -> list[Wait]:
    """The waits of an HLO text (`compiled.as_text()`), in its order. per_host: devices of a host, which are numbered in order."""
    found = []
    for _, body in computations(program):
        kinds = ((x, _kind(x, per_host)) for x in body)
        found += [Wait(kind, x.op_name) for x, kind in kinds if kind is not None]
    return found


def summary(waits: list[Wait]) -> str:
    """One line for each kind and place, with how often it stands in the program; a line if there is none."""
    if not waits:
        return "  nothing waits for the host"
    return "\n".join(f"  {n:>3} x {w.kind}: {w.op_name}" for w, n in collections.Counter(waits).items())

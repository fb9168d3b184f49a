"""Reads in a profile by `jax.profiler` how the time of a step divides over kernels.

A kernel of `pallas_kernels` goes by its name, an instruction of XLA by that of its kind: the compiled program says which
is which. On a GPU the time is that of its streams; elsewhere, of the operations that the host ran.
"""

import collections
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from experiments.study.hlo_schedule import computations

_KERNEL = re.compile(r"jit\((\w+)\)/body")
AROUND_OTHERS = ("while", "cond", "conditional", "call")  # on a host, whose time is that of what they run
_NUMBER = re.compile(r"([._]\d+|\.clone)+$")


def labels(program: str) -> dict[str, str]:
    """Instruction of a compiled program (`compiled.as_text()`) -> what it is counted as."""
    found = {}
    for _, body in computations(program):
        for instruction in body:
            kernel = _KERNEL.search(instruction.op_name)
            inside = kernel is not None and instruction.opcode in ("custom-call", "fusion")
            found[instruction.name] = kernel[1] if kernel is not None and inside else kind(instruction.name)
    return found


def kind(name: str) -> str:
    """The name of an instruction or kernel without the numbers that tell it from others of its kind."""
    return _NUMBER.sub("", name)[:40]


def _events(profile: jax.profiler.ProfileData) -> Iterator[tuple[str, float]]:
    """(instruction, or kernel where the profile does not say which, nanoseconds) of whatever devices did."""
    planes = list(profile.planes)
    on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in on_gpu or planes:
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue  # a summary of the streams
            for event in line.events:
                instruction = dict(event.stats).get("hlo_op")
                if instruction is not None or on_gpu:
                    yield str(instruction or event.name), event.duration_ns


def shares(folder: Path, program: str) -> dict[str, float]:
    """What a step's time went to, by kind of kernel -> its share, largest first. Raises ValueError for a folder without a
    profile."""
    paths = sorted(folder.rglob("*.xplane.pb"))
    if not paths:
        raise ValueError(f"no *.xplane.pb in {str(folder)!r}: nothing was profiled")
    known, spent = labels(program), collections.defaultdict[str, float](float)
    for name, nanoseconds in _events(jax.profiler.ProfileData.from_file(str(paths[-1]))):
        spent[known.get(name, kind(name))] += nanoseconds
    for name in AROUND_OTHERS:
        spent.pop(name, None)
    whole = sum(spent.values()) or 1
    return {name: time / whole for name, time in sorted(spent.items(), key=lambda entry: -entry[1])}

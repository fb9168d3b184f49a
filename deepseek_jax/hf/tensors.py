"""A safetensors file's header is read and checked, its tensors are mapped, and a new file is written, here.

A tensor is read through a memory map of its own bytes, which is dropped at once, so resident memory is that of
one tensor. Writing streams as well: a file's header is known before its first tensor is. Nothing is unpickled.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from deepseek_jax.checks import named, plain, require, shown
from deepseek_jax.json_files import MAX_BYTES, parse_object

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}  # order of the data: wide types first
_ALIGN = 8  # headers are padded to this
_MAX_RANK = 8


class Tensor(NamedTuple):
    """Where one tensor lies. `dtype` is safetensors' name; `start` the first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        """A memory map of the data; it is mapped until the array and its views are gone."""
        if 0 in self.shape:
            return np.empty(self.shape, DTYPES[self.dtype])
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.start, self.shape)


# --- reading ----------------------------------------------------------------------------------------------


def read_header(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns (tensors in the order of their data, free-form strings) of one safetensors file.

    Raises ValueError naming file and tensor: not such a file, truncated, an entry of the header that is malformed or
    does not fit its bytes, tensors that overlap or leave bytes between or behind them.
    """
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_BYTES):
            raise ValueError(f"{file} is truncated or not a safetensors file: its header is not whole")
        raw = f.read(length)
    with named(f"{file} is not a safetensors file: "):
        header = parse_object(raw, "its header")
    metadata = header.pop("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    require(strings, f"{file}: __metadata__={shown(metadata)} should map names to strings")
    for name, entry in header.items():
        _check_entry(f"{file}: tensor {plain(name)}", entry)
    first, end, tensors = 8 + length, 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if first + stop > size:
            raise ValueError(
                f"{file} is truncated: tensor {plain(name)} ends at byte {first + stop} of {size}"
            )
        if begin != end:
            raise ValueError(
                f"{file} is damaged: tensor {plain(name)} begins at {begin}, the one before ends at {end}"
            )
        tensors[name] = Tensor(file, entry["dtype"], tuple(entry["shape"]), first + begin)
        end = stop
    if first + end != size:
        raise ValueError(f"{file} is truncated or damaged: {size - first - end} bytes belong to no tensor")
    return tensors, metadata


def _check_entry(where: str, entry: Any) -> None:
    """Checks one tensor's description in a header."""
    fields = sorted(entry) if isinstance(entry, dict) else None
    require(fields == ["data_offsets", "dtype", "shape"], f"{where} is described by {shown(entry)}")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    require(isinstance(dtype, str), f"{where} has dtype={shown(dtype)}, which should be a string")
    for name, value, longest in (("shape", shape, _MAX_RANK), ("data_offsets", offsets, 2)):
        ok = isinstance(value, list) and len(value) <= longest
        ok = ok and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in value)
        require(
            ok, f"{where} has {name}={shown(value)}, which should be at most {longest} integers, 0 or more"
        )
    require(len(offsets) == 2 and offsets[0] <= offsets[1], f"{where} has data_offsets={offsets}")
    if dtype in DTYPES:
        needed, has = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
        require(
            needed == has, f"{where} of dtype {dtype} and shape {shape} has {has} bytes instead of {needed}"
        )


# --- writing ----------------------------------------------------------------------------------------------

Spec = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of a tensor to be written


def write_shard(
    file: Path,
    names: Iterable[str],
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    produce: Callable[[str], np.ndarray],
    written: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes one safetensors file, tensor by tensor, under a temporary name until it is whole.

    The order of the tensors is the safetensors library's, so files that it wrote come out bitwise equal.
    `written` is called with the number of bytes after each tensor.
    """
    order = sorted(names, key=lambda name: (_RANK[_NAMES[specs[name][0]]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape = specs[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGN)
    partial = file.with_name(file.name + ".partial")
    with open(partial, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            dtype, shape = specs[name]
            x = produce(name)
            assert x.dtype == dtype and x.shape == shape, (name, x.dtype, x.shape, dtype, shape)
            f.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
            written(x.nbytes)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, file)

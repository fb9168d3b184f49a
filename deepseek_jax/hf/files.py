"""Checkpoint folders on disk: sharded safetensors with an index, checked whole before a byte of data is read.

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
import safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {"F32": 0, "BF16": 1, "F8_E4M3": 2}  # order of the data: wide types first
_ALIGN = 8  # headers are padded to this
_HEADER_LIMIT = 100_000_000  # safetensors' own


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


class Layout(NamedTuple):
    """How tensors are spread over files: file name -> tensor names, and the header's free-form strings."""

    files: dict[str, list[str]]
    metadata: dict[str, dict[str, str]]
    index_metadata: dict[str, Any] | None  # the index file's own "metadata"; None: there is no index


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises ValueError naming the file."""
    return _read_json(path / "config.json")


def scan(path: Path) -> tuple[dict[str, Tensor], Layout]:
    """Every tensor of a checkpoint folder, from the headers alone.

    Raises ValueError naming file and tensor: no folder, no or broken index, index that points outside the
    folder, missing or truncated shard, tensors that index and shards do not agree on.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder with a checkpoint")
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            raise ValueError(f"{path} holds neither {INDEX} nor {SINGLE}; other formats are not read")
        tensors, metadata = _read_header(path / SINGLE)
        return tensors, Layout({SINGLE: list(tensors)}, {SINGLE: metadata}, None)
    index = _read_json(path / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path / INDEX} has no weight_map")
    tensors, layout = {}, Layout({}, {}, index.get("metadata", {}))
    by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{path / INDEX}: tensor {name} points outside the folder: {file!r}")
        by_file.setdefault(file, []).append(name)
    for file, names in by_file.items():
        if not (path / file).exists():
            raise ValueError(f"{path / file} is missing; it should hold {names[0]} and {len(names) - 1} more")
        found, layout.metadata[file] = _read_header(path / file)
        for name in names:
            if name not in found:
                raise ValueError(f"{path / file} lacks tensor {name}, which {INDEX} places there")
        for name in found:
            if weight_map.get(name) != file:
                raise ValueError(f"{path / file} holds tensor {name}, which {INDEX} does not place there")
        layout.files[file] = list(found)
        tensors |= found
    return tensors, layout


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def _read_header(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors in the order of their data, free-form strings) of one safetensors file."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"{file} is truncated or not a safetensors file: its header is not whole")
        raw = f.read(length)
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a safetensors file: its header is not JSON ({error})") from error
    metadata = header.pop("__metadata__", {})
    tensors = {}
    try:
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError(
                    f"{file} is truncated: tensor {name} ends at byte {8 + length + end} of {size}"
                )
            tensors[name] = Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
            dtype = DTYPES.get(entry["dtype"])
            if dtype is not None and end - begin != math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"{file}: tensor {name} of shape {entry['shape']} has {end - begin} bytes")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a safetensors file: malformed header ({error!r})") from error
    try:  # the library's own judgement: gaps, overlaps, trailing bytes
        with safetensors.safe_open(str(file), framework="np"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error
    return tensors, metadata


# --- writing ----------------------------------------------------------------------------------------------

Spec = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of a tensor to be written


def plan_shards(specs: Mapping[str, Spec], shard_bytes: int) -> Layout:
    """Tensors in their given order, filled into files of at most `shard_bytes` (or one tensor)."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, (dtype, shape) in specs.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= nbytes
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    metadata = {name: {"format": "pt"} for name in names}  # what transformers asks for
    return Layout(dict(zip(names, shards, strict=True)), metadata, {"total_size": total})


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


def write_index(path: Path, layout: Layout) -> None:
    """The index file, unless the layout has none."""
    if layout.index_metadata is None:
        return
    weight_map = {name: file for file, names in layout.files.items() for name in names}
    index = {"metadata": layout.index_metadata, "weight_map": dict(sorted(weight_map.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

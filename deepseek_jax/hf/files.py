"""`scan` checks a checkpoint folder (config.json, index, safetensors files) before a byte of data is read."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.checks import plain, require, shown
from deepseek_jax.hf.packed import unpacked
from deepseek_jax.hf.tensors import Spec, Tensor, read_header
from deepseek_jax.json_files import read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_NAME = 255  # bytes that file systems take


class Layout(NamedTuple):
    """Which file holds which tensors: file name -> tensor names, and the header's free-form strings."""

    files: dict[str, list[str]]
    metadata: dict[str, dict[str, str]]
    # what the index file has beside its weight_map; None: there is no index
    index_file: dict[str, Any] | None


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises ValueError naming the file."""
    return read_object(path / "config.json")


def scan(path: Path) -> tuple[dict[str, Tensor], Layout]:
    """Lists every tensor of a checkpoint folder from the headers alone; packed experts are listed one by one.

    Raises ValueError naming file and tensor: no folder, no or broken index, index that points outside the
    folder, missing or truncated shard, tensors that index and shards do not agree on.
    """
    require(path.is_dir(), f"{path} is not a folder with a checkpoint")
    if not (path / INDEX).exists():
        if not (path / SINGLE).is_file():
            raise ValueError(f"{path} holds neither {INDEX} nor {SINGLE}; other formats are not read")
        found, metadata = read_header(path / SINGLE)
        tensors = unpacked(found)
        return tensors, Layout({SINGLE: list(tensors)}, {SINGLE: metadata}, None)
    index = read_object(path / INDEX)
    by_file = _files(path / INDEX, index.pop("weight_map", None))
    tensors, layout = {}, Layout({}, {}, index)
    for file, names in by_file.items():
        if not (path / file).is_file():
            raise ValueError(
                f"{path / file} is missing; it should hold {plain(names[0])} and {len(names) - 1} more"
            )
        found, layout.metadata[file] = read_header(path / file)
        for name in names:
            require(name in found, f"{path / file} lacks tensor {plain(name)}, which {INDEX} places there")
        placed = set(names)
        for name in found:
            if name not in placed:
                raise ValueError(
                    f"{path / file} holds tensor {plain(name)}, which {INDEX} does not place there"
                )
        found = unpacked(found)
        layout.files[file] = list(found)
        tensors |= found
    return tensors, layout


def _files(index: Path, weight_map: Any) -> dict[str, list[str]]:
    """Returns file name -> names of its tensors."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, from tensors to files: it is {shown(weight_map)}")
    by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_file_name(file):
            raise ValueError(f"{index}: tensor {plain(name)} points outside the folder: {shown(file)}")
        by_file.setdefault(file, []).append(name)
    return by_file


def is_file_name(name: str) -> bool:
    """Whether `name` is a plain file name, without a folder in it."""
    return name.isprintable() and Path(name).name == name != ".." and len(name.encode()) <= _LONGEST_NAME


def plan_shards(specs: Mapping[str, Spec], shard_bytes: int) -> Layout:
    """Fills tensors in their given order into files of at most `shard_bytes` (or one tensor)."""
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
    return Layout(dict(zip(names, shards, strict=True)), metadata, {"metadata": {"total_size": total}})


def write_index(path: Path, layout: Layout) -> None:
    """Writes the index file, unless the layout has none."""
    if layout.index_file is None:
        return
    weight_map = {name: file for file, names in layout.files.items() for name in names}
    index = layout.index_file | {"weight_map": dict(sorted(weight_map.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

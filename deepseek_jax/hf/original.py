"""A converted orbax checkpoint remembers its Hugging Face folder, so that the way back gives the same files.

The checkpoint's metadata holds, under `huggingface`: config.json, the dtype of every tensor by file, the files'
free-form strings, and the fields that the index file has beside its table.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.checks import plain, require, shown
from deepseek_jax.config import ModelConfig
from deepseek_jax.hf.config import from_hf
from deepseek_jax.hf.files import Layout, is_file_name
from deepseek_jax.hf.read import Checkpoint
from deepseek_jax.hf.tensors import DTYPES
from deepseek_jax.hf.write import Producer


class Kept(NamedTuple):
    """A Hugging Face folder as a checkpoint remembers it.

    config: its config.json. files: file -> tensor -> dtype. metadata: file -> the header's strings. index_file: the
    fields of the index file without its table; None if there was no index.
    """

    config: dict[str, Any]
    files: dict[str, dict[str, str]]
    metadata: dict[str, dict[str, str]]
    index_file: dict[str, Any] | None


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """The metadata that a folder's checkpoint keeps, as JSON."""
    layout = checkpoint.layout
    files = {
        file: {name: checkpoint.tensors[name].dtype for name in names if name in checkpoint.tensors}
        for file, names in layout.files.items()
    }
    return Kept(checkpoint.hf, files, layout.metadata, layout.index_file)._asdict()


def read(meta: Mapping[str, Any], cfg: ModelConfig, where: Path) -> Kept | None:
    """The folder that a checkpoint's metadata remembers; None for the metadata of a training run.

    Raises ValueError, naming the field, for a wrong type, a name that is no file's or no dtype's, and a config.json
    that describes another model than the checkpoint's.
    """
    kept = meta.get("huggingface")
    if kept is None:
        return None
    name = f"{where / 'meta'}: huggingface"
    require(isinstance(kept, dict), f"{name}={shown(kept)} should be an object")
    found = Kept(**{key: kept.get(key) for key in Kept._fields})
    for key, value in found._asdict().items():
        ok = isinstance(value, dict) or (key == "index_file" and value is None)
        require(ok, f"{name}.{key}={shown(value)} should be an object")
    for file, dtypes in found.files.items():
        strings = found.metadata.get(file)
        ok = is_file_name(file) and file.endswith(".safetensors")
        ok = ok and _are_strings(dtypes) and _are_strings(strings)
        require(ok, f"{name}.files: {plain(file)} is described by {shown(dtypes)} and {shown(strings)}")
        for tensor, dtype in dtypes.items():
            require(dtype in DTYPES, f"{name}.files: tensor {plain(tensor)} has dtype {plain(dtype)}")
    said = from_hf(found.config)
    said = dataclasses.replace(said, num_nextn_predict_layers=cfg.num_nextn_predict_layers)
    other = [f.name for f in dataclasses.fields(cfg) if getattr(said, f.name) != getattr(cfg, f.name)]
    require(not other, f"{name}.config is of another model than config.model: they differ in {other}")
    return found


def _are_strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for x in value.values())


def restored(kept: Kept, producer: Producer) -> Layout:
    """The files of the remembered folder; each tensor gets the dtype that it had there.

    Raises ValueError for a tensor that no file has, or that cannot have the dtype.
    """
    files = {}
    for file, dtypes in kept.files.items():
        names = [name for name in dtypes if name in producer.specs]
        if names:
            files[file] = names
        for name in names:
            producer.restore_dtype(name, dtypes[name])
    placed = {name for names in files.values() for name in names}
    for name in producer.needed():
        require(name in placed, f"tensor {name} is in none of the files that the checkpoint came in")
    return Layout(files, kept.metadata, kept.index_file)

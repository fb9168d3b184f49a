"""Parameter tree -> Hugging Face checkpoint that `transformers` loads, MTP modules included.

`tensor_specs` says which tensors a checkpoint has in a given format, `Producer` makes them one at a time from
any source of leaf pieces, so that saving from memory and converting from disk share this code.
"""

import abc
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hf import fp8
from deepseek_jax.hf.config import quantization_config, to_hf
from deepseek_jax.hf.files import plan_shards, write_index
from deepseek_jax.hf.names import Index, Leaf, bias_names, get, leaves, shared_copies
from deepseek_jax.hf.read import SCALE, SCALE_SUFFIX, Q
from deepseek_jax.hf.tensors import DTYPES, Spec, write_shard

FORMATS = ("bf16", "fp8", "f32", "stored")
SHARD_BYTES = 5_000_000_000
_DTYPE = {"bf16": DTYPES["BF16"], "fp8": DTYPES["BF16"], "f32": DTYPES["F32"]}


def save(
    path: str | Path,
    cfg: ModelConfig,
    params: Any,
    balance_bias: Any,
    format: str = "bf16",
    *,
    scale: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a checkpoint folder: config.json, safetensors of at most `shard_bytes`, and their index.

    Args:
        path: must not exist yet, or be empty. It appears whole or not at all.
        params: parameter tree; leaves may be kept in FP8, as `load(..., keep_fp8=True)` gives them.
        balance_bias: [layer, expert]; written in float32 always. Not written for softmax gating.
        format: "bf16" or "f32" for all matrices; "fp8": DeepSeek's layout, e4m3 blocks of 128 x 128 for the
            matrices of attention and FFN, the rest in bfloat16; "stored": every leaf as it is.
        scale: of "fp8": "fp32" (V3) or "ue8m0" (V3.1).
        tokenizer: its files are written too, and config.json names its ids.

    Raises:
        ValueError: `path` is in use; unknown format; parameters that do not fit `cfg`, naming the leaf.
    """
    path = Path(path).absolute()
    require_free(path)
    source = _MemorySource(cfg, params, balance_bias)
    producer = Producer(cfg, source, format, scale)
    config = producer.config() | ({} if tokenizer is None else tokenizer.generation_ids())
    layout = plan_shards(producer.specs, shard_bytes)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file, names in layout.files.items():
        write_shard(partial / file, names, producer.specs, layout.metadata[file], producer)
    write_index(partial, layout)
    if tokenizer is not None:
        tokenizer.save(partial)
    if path.exists():
        path.rmdir()
    os.replace(partial, path)


def require_free(path: Path) -> None:
    """Raises ValueError if something would be overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: remove it or write elsewhere")


class Source(abc.ABC):
    """Where leaf pieces come from. dtypes: of each leaf by path, `fp8.E4M3` for one kept in FP8."""

    dtypes: dict[str, np.dtype]

    @abc.abstractmethod
    def piece(self, leaf: Leaf, index: Index) -> np.ndarray:
        """One tensor in this model's layout; of a leaf kept in FP8, its values in the checkpoint's layout."""

    @abc.abstractmethod
    def scale(self, leaf: Leaf, index: Index) -> np.ndarray:
        """Scales of a piece kept in FP8."""

    @abc.abstractmethod
    def bias(self) -> np.ndarray:
        """balance_bias, float32 [layer, expert]."""


class _MemorySource(Source):
    """Pieces of a parameter tree in memory; of an array on devices, one layer is on the host at a time."""

    def __init__(self, cfg: ModelConfig, params: Any, balance_bias: Any):
        self._params, self._bias = params, np.asarray(balance_bias, np.float32)
        if self._bias.shape != cfg.balance_bias_shape:
            raise ValueError(f"balance_bias has shape {self._bias.shape}, expected {cfg.balance_bias_shape}")
        self.dtypes = {}
        self._layers: dict[str, tuple[int, np.ndarray]] = {}
        for path, leaf in leaves(cfg).items():
            self.dtypes[path] = self._check(path, leaf)

    def _check(self, path: str, leaf: Leaf) -> np.dtype:
        try:
            x = get(self._params, path)
        except KeyError as error:
            raise ValueError(f"params lack {path} of shape {leaf.shape}") from error
        shape, allowed = leaf.shape, [DTYPES["F32"], DTYPES["BF16"]]
        if isinstance(x, dict):
            x, shape, allowed = x[Q], (*leaf.stack, *leaf.hf_shape), [fp8.E4M3]
        if tuple(x.shape) != shape or np.dtype(x.dtype) not in allowed:
            raise ValueError(
                f"params.{path} is {np.dtype(x.dtype)}{list(x.shape)}, expected one of "
                f"{[str(d) for d in allowed]} and shape {list(shape)}"
            )
        return np.dtype(x.dtype)

    def piece(self, leaf: Leaf, index: Index) -> np.ndarray:
        x = get(self._params, leaf.path)
        return self._host(leaf.path, x[Q] if isinstance(x, dict) else x, index)

    def scale(self, leaf: Leaf, index: Index) -> np.ndarray:
        return self._host(leaf.path + SCALE, get(self._params, leaf.path)[SCALE], index)

    def bias(self) -> np.ndarray:
        return self._bias

    def _host(self, key: str, x: Any, index: Index) -> np.ndarray:
        on_host = not isinstance(x, jax.Array) or (
            x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())
        )
        if on_host or not index:
            return np.asarray(x)[index]
        if self._layers.get(key, (None,))[0] != index[0]:
            self._layers[key] = (index[0], np.asarray(jax.lax.dynamic_index_in_dim(x, index[0], 0, False)))
        return self._layers[key][1][index[1:]]


@dataclasses.dataclass
class _Part:
    """What one tensor of the checkpoint is made of. kind: "plain", "fp8", "scale" or "bias"."""

    kind: str
    leaf: Leaf | None
    index: Index


# By kind of part, the dtypes in which a file may have had it.
_RESTORABLE = {
    "plain": ("F32", "BF16"),
    "bias": ("F32", "BF16"),
    "fp8": ("F8_E4M3",),
    "scale": ("F32", "F8_E8M0"),
}


class Producer:
    """Makes the tensors of a checkpoint by name, in a format. `specs` has dtype and shape of each, in order.

    Raises ValueError for an unknown format or scale.
    """

    def __init__(self, cfg: ModelConfig, source: Source, format: str, scale: str = "fp32"):
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is not one of {list(FORMATS)}")
        if scale not in ("fp32", "ue8m0"):
            raise ValueError(f"scale={scale!r} is not one of ['fp32', 'ue8m0']")
        self._cfg, self._source, self._format, self._scale = cfg, source, format, scale
        self._parts: dict[str, _Part] = {}
        self.specs: dict[str, Spec] = {}
        for leaf in leaves(cfg).values():
            for index in leaf.indices():
                self._add(leaf, index)
        for row, name in enumerate(bias_names(cfg)):
            self._parts[name] = _Part("bias", None, (row,))
            self.specs[name] = (DTYPES["F32"], (cfg.n_routed_experts,))
        for copy, original in shared_copies(cfg).items():
            self._parts[copy], self.specs[copy] = self._parts[original], self.specs[original]
        self.specs = {name: self.specs[name] for name in sorted(self.specs, key=_by_layer)}

    def _add(self, leaf: Leaf, index: Index) -> None:
        name, stored = leaf.name(index), self._source.dtypes[leaf.path]
        as_fp8 = stored == fp8.E4M3 if self._format == "stored" else self._format == "fp8" and leaf.may_be_fp8
        if as_fp8:
            self._parts[name + SCALE_SUFFIX] = _Part("scale", leaf, index)
            self.specs[name + SCALE_SUFFIX] = (DTYPES["F32"], fp8.scale_shape(leaf.hf_shape))
        self._parts[name] = _Part("fp8" if as_fp8 else "plain", leaf, index)
        dtype = fp8.E4M3 if as_fp8 else _DTYPE.get(self._format, stored)
        self.specs[name] = (dtype, leaf.hf_shape)

    def needed(self) -> Iterator[str]:
        """Names of the tensors that no checkpoint can be without: not the MTP modules' copies."""
        copies = shared_copies(self._cfg)
        return (name for name in self.specs if name not in copies)

    def restore_dtype(self, name: str, dtype: str) -> None:
        """Makes a tensor in a dtype, by safetensors' name, in which a file had it. Raises ValueError for another kind."""
        allowed = _RESTORABLE[self._parts[name].kind]
        if dtype not in allowed:
            raise ValueError(f"tensor {name} cannot be {dtype}, only one of {list(allowed)}")
        self.specs[name] = (DTYPES[dtype], self.specs[name][1])

    def config(self) -> dict[str, Any]:
        """config.json for this format."""
        config = to_hf(self._cfg)
        if self._format != "stored":
            config["torch_dtype"] = "float32" if self._format == "f32" else "bfloat16"
        if any(dtype == fp8.E4M3 for dtype, _ in self.specs.values()):
            config["quantization_config"] = quantization_config(self._scale)
        return config

    def __call__(self, name: str) -> np.ndarray:
        """The tensor of that name, with the dtype and shape of its spec."""
        part = self._parts[name]
        if part.leaf is None:
            return np.ascontiguousarray(self._source.bias()[part.index].astype(self.specs[name][0]))
        stored_fp8 = self._source.dtypes[part.leaf.path] == fp8.E4M3
        if part.kind == "plain":
            return self._plain(part.leaf, part.index, self.specs[name][0])
        if stored_fp8:
            read = self._source.piece if part.kind == "fp8" else self._source.scale
            return read(part.leaf, part.index).astype(self.specs[name][0], copy=False)
        return self._quantise(part)

    def _plain(self, leaf: Leaf, index: Index, dtype: np.dtype) -> np.ndarray:
        x = self._source.piece(leaf, index)
        if x.dtype == fp8.E4M3:
            return fp8.dequantise(x, self._source.scale(leaf, index), dtype)
        return leaf.to_hf(x).astype(dtype)

    def _quantise(self, part: _Part) -> np.ndarray:
        assert part.leaf is not None
        w = self._plain(part.leaf, part.index, DTYPES["F32"])
        try:
            scales = fp8.block_scales(w, self._scale)
        except ValueError as error:
            raise ValueError(f"params.{part.leaf.path}{list(part.index)}: {error}") from error
        return scales if part.kind == "scale" else fp8.quantise(w, scales)


def _by_layer(name: str) -> tuple[int, int, str]:
    """Sort key: embedding, then layer by layer, then final norm and head."""
    parts = name.split(".")
    if parts[1] == "layers":
        return 1, int(parts[2]), name
    return (0 if parts[1] == "embed_tokens" else 2), 0, name

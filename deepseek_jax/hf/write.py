"""`save` writes a parameter tree as a Hugging Face checkpoint that `transformers` loads, MTP modules included.

`Producer` says which tensors a checkpoint has in a given format, and makes them one at a time from any source, so
that saving from memory and converting from disk share this code.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.checks import choice, named, path_of, require
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hf import fp8
from deepseek_jax.hf.config import quantization_config, to_hf
from deepseek_jax.hf.files import Layout, plan_shards, write_index
from deepseek_jax.hf.names import Index, Leaf, bias_names, get, leaves, shared_copies
from deepseek_jax.hf.read import SCALE_SUFFIX
from deepseek_jax.hf.source import SCALE, Q, Source, require_fit
from deepseek_jax.hf.tensors import DTYPES, Spec, write_shard
from pallas_kernels.quantize.reference import SCALE_FORMATS

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
    path = path_of(path, "path").absolute()
    require_free(path)
    source = _MemorySource(cfg, params, balance_bias)
    producer = Producer(source, format, scale)
    config = producer.config() | ({} if tokenizer is None else tokenizer.generation_ids())
    layout = plan_shards(producer.specs, shard_bytes)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_model(partial, config, layout, producer)
    if tokenizer is not None:
        tokenizer.save(partial)
    if path.exists():
        path.rmdir()
    os.replace(partial, path)


def require_free(path: Path) -> None:
    """Raises ValueError if something would be overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: remove it or write elsewhere")


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    layout: Layout,
    producer: "Producer",
    written: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes config.json, the safetensors files that are not there yet, and the index.

    `written` is called with the number of bytes of each tensor, whether written now or found.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file, names in layout.files.items():
        if (folder / file).exists():
            written(producer.nbytes(names))
        else:
            write_shard(folder / file, names, producer.specs, layout.metadata[file], producer, written)
    write_index(folder, layout)


class _MemorySource(Source):
    """A parameter tree in memory; of an array on devices, one layer is on the host at a time."""

    def __init__(self, cfg: ModelConfig, params: Any, balance_bias: Any):
        self.cfg, self._params, self._bias = cfg, params, np.asarray(balance_bias, np.float32)
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
        shape = leaf.shape
        allowed: tuple[np.dtype, ...] = (DTYPES["F32"], DTYPES["BF16"])
        if isinstance(x, dict):
            x, shape, allowed = x[Q], (*leaf.stack, *leaf.hf_shape), (fp8.E4M3,)
        require_fit(f"params.{path}", (np.dtype(x.dtype), tuple(x.shape)), allowed, shape)
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


class _Part(NamedTuple):
    """Says how one tensor is made. kind: "plain", "fp8" or "scale" of a leaf at an index, or "bias", without a leaf."""

    kind: str
    leaf: Leaf | None
    at: Index


# By kind of part, the dtypes in which a file may have had it, if not the usual ones.
_RESTORABLE = {"fp8": ("F8_E4M3",), "scale": ("F32", "F8_E8M0")}


class Producer:
    """Makes the tensors of a checkpoint by name, in a format. `specs` has dtype and shape of each, in order.

    Raises ValueError for an unknown format or scale.
    """

    def __init__(self, source: Source, format: str, scale: str = "fp32"):
        choice("format", format, FORMATS)
        choice("scale", scale, SCALE_FORMATS)
        cfg = self._cfg = source.cfg
        self._source, self._format, self._scale = source, format, scale
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
        """Names of the tensors that every checkpoint must have: all but the MTP modules' copies."""
        copies = shared_copies(self._cfg)
        return (name for name in self.specs if name not in copies)

    def restore_dtype(self, name: str, dtype: str) -> None:
        """Sets a tensor's dtype, by safetensors' name, to that in a file. Raises ValueError for another kind."""
        allowed = _RESTORABLE.get(self._parts[name].kind, ("F32", "BF16"))
        require(dtype in allowed, f"tensor {name} cannot be {dtype}, only one of {list(allowed)}")
        self.specs[name] = (DTYPES[dtype], self.specs[name][1])

    def config(self) -> dict[str, Any]:
        """Returns config.json for this format."""
        config = to_hf(self._cfg)
        if self._format != "stored":
            config["torch_dtype"] = "float32" if self._format == "f32" else "bfloat16"
        if any(dtype == fp8.E4M3 for dtype, _ in self.specs.values()):
            config["quantization_config"] = quantization_config(self._scale)
        return config

    def __call__(self, name: str) -> np.ndarray:
        """Makes the tensor of that name, with the dtype and shape of its spec."""
        kind, leaf, index = self._parts[name]
        dtype, _ = self.specs[name]
        if leaf is None:
            x = self._source.bias()[index]
        elif kind == "plain":
            x = self._plain(leaf, index, dtype)
        elif self._source.dtypes[leaf.path] == fp8.E4M3:
            x = self._source.piece(leaf, index) if kind == "fp8" else self._source.scale(leaf, index)
        else:
            x = self._quantised(kind, leaf, index)
        return x.astype(dtype, copy=False)

    def nbytes(self, names: Iterable[str]) -> int:
        """Counts the bytes of the tensors of these names."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in map(self.specs.__getitem__, names))

    def _plain(self, leaf: Leaf, index: Index, dtype: np.dtype) -> np.ndarray:
        x = np.empty(leaf.piece_shape, dtype)
        self._source.read(leaf, index, (slice(None),) * x.ndim, x)
        return leaf.to_hf(x)

    def _quantised(self, kind: str, leaf: Leaf, index: Index) -> np.ndarray:
        w = self._plain(leaf, index, DTYPES["F32"])
        with named(f"params.{leaf.path}{list(index)}: "):
            scales = fp8.block_scales(w, self._scale)
        return scales if kind == "scale" else fp8.quantise(w, scales)


def _by_layer(name: str) -> tuple[int, int, str]:
    """Sort key: embedding, then layer by layer, then final norm and head."""
    parts = name.split(".")
    if parts[1] == "layers":
        return 1, int(parts[2]), name
    return (0 if parts[1] == "embed_tokens" else 2), 0, name

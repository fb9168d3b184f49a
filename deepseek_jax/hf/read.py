"""`load` reads a Hugging Face checkpoint into a parameter tree, tensor by tensor.

`Checkpoint` checks a folder whole (files, names, shapes, dtypes) from the headers alone; only then is data read.
Over a mesh every device's slice is read from just the bytes that it covers, a layer at a time (`arrays.py`).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.checks import choice, named, path_of, plain
from deepseek_jax.config import ModelConfig
from deepseek_jax.hf import fp8
from deepseek_jax.hf.arrays import on_devices
from deepseek_jax.hf.config import from_hf
from deepseek_jax.hf.files import read_config, scan
from deepseek_jax.hf.names import Index, Leaf, bias_names, leaves, mtp_of, shared_copies
from deepseek_jax.hf.source import Source
from deepseek_jax.hf.tensors import DTYPES, Tensor

SCALE_SUFFIX = "_scale_inv"  # follows "<name>.weight"
_SCALES = ("F32", "F8_E8M0")
_WITHOUT_MTP = "to leave out the MTP modules: mtp=False (experiments: --nomtp)"
_HEAD = "lm_head.weight"
_IGNORED = ("rotary_emb.inv_freq",)  # derived from the config; old files carry it
_FLOATS = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"]}


def load(
    path: str | Path,
    dtype: str | None = None,
    *,
    keep_fp8: bool = False,
    mtp: bool = True,
    shardings: Any = None,
    plan: Any = None,
) -> tuple[ModelConfig, Any, jax.Array]:
    """Loads a Hugging Face checkpoint of the family.

    Args:
        path: folder with config.json and safetensors, one file or sharded with an index.
        dtype: "float32" or "bfloat16" for all parameters and as compute dtype; None: as stored (FP8 becomes
            bfloat16), computing in the `torch_dtype` of config.json.
        keep_fp8: leave FP8 matrices in FP8: {"fp8": float8_e4m3fn [stack..., out, in], "scale": float32
            [stack..., out blocks, in blocks]} in the leaf's place, instead of dequantised.
        mtp: False leaves the MTP modules out, as if the files had none: for a fine-tune that carries stale ones.
        shardings: tree like the parameters of `jax.sharding.Sharding`, or a function of the config that gives one; each
            device reads only its slice. None: the default device. See `arrays.on_devices`.
        plan: `balancing.plan.Plan` in whose slots experts lie, or a function of the config that gives one; None: in their
            order. See `slotted.in_slots`.

    Returns:
        (config, parameters stacked by layer, balance_bias float32 [layer, expert]). Where the config promises MTP
        modules and the files have none, the config returned has none.

    Raises:
        ValueError: anything wrong with the folder, naming file and tensor, before data is read.
    """
    checkpoint = Checkpoint(path, mtp)
    cfg = checkpoint.cfg
    if dtype is not None:
        choice("dtype", dtype, tuple(_FLOATS))
        cfg = dataclasses.replace(cfg, dtype=dtype)
    shardings = shardings(checkpoint.cfg) if callable(shardings) else shardings
    plan = plan(checkpoint.cfg) if callable(plan) else plan
    params = on_devices(checkpoint, shardings, None if dtype is None else _FLOATS[dtype], keep_fp8, plan)
    return cfg, params, jax.device_put(checkpoint.bias())


class Checkpoint(Source):
    """A checked checkpoint folder.

    hf: parsed config.json. cfg: its ModelConfig, without MTP modules if the files have none or with `mtp` False.
    tensors: by name. layout: how they are spread over files. leaves: of the parameter tree, by path.
    mixed: paths of the leaves that are FP8 in some layers only.

    Raises ValueError naming file and tensor.
    """

    def __init__(self, path: str | Path, mtp: bool = True):
        self.path = path_of(path, "path").absolute()
        self.hf = read_config(self.path)
        with named(f"{self.path}/"):
            cfg = from_hf(self.hf)
        self.tensors, self.layout = scan(self.path)
        modules = mtp_of(cfg, self.tensors)
        if not (mtp and modules):
            cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
        if not mtp:
            self.tensors = {name: x for name, x in self.tensors.items() if name not in modules}
            self.hf = {k: v for k, v in self.hf.items() if k != "num_mtp_layers"} | {
                "num_nextn_predict_layers": 0
            }
        self.cfg = cfg
        self.leaves = leaves(cfg)
        self._check()
        kinds = {
            path: {self.tensors[leaf.name(i)].dtype for i in leaf.indices()}
            for path, leaf in self.leaves.items()
        }
        self.dtypes = {path: _dtype_for(stored) for path, stored in kinds.items()}
        self.mixed = [path for path, stored in kinds.items() if "F8_E4M3" in stored and len(stored) > 1]

    def piece(self, leaf: Leaf, index: Index) -> np.ndarray:
        """Maps the tensor into memory: only the bytes that are used are read."""
        w = self.tensors[leaf.name(index)].read()
        return w if w.dtype == fp8.E4M3 else leaf.from_hf(w)

    def scale(self, leaf: Leaf, index: Index) -> np.ndarray:
        """Raises ValueError for scales that are negative or not finite."""
        name = leaf.name(index) + SCALE_SUFFIX
        return fp8.checked_scales(self.tensors[name].read(), f"{self.tensors[name].file}: tensor {name}")

    def bias(self) -> np.ndarray:
        """float32 [layer, expert]; zeros for softmax gating. Raises ValueError where it is not finite."""
        bias = np.zeros(self.cfg.balance_bias_shape, np.float32)
        for row, name in enumerate(bias_names(self.cfg)):
            bias[row] = self.tensors[name].read()
            if not np.isfinite(bias[row]).all():
                raise ValueError(f"{self.tensors[name].file}: tensor {name} holds values that are not finite")
        return bias

    # --- checks -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        expected: set[str] = set()
        for leaf in self.leaves.values():
            for index in leaf.indices():
                expected |= self._check_tensor(leaf.name(index), leaf.hf_shape, leaf.may_be_fp8)
        for name in bias_names(self.cfg):
            expected |= self._check_tensor(name, (self.cfg.n_routed_experts,), False)
        copies = shared_copies(self.cfg)
        if self.cfg.tie_word_embeddings:
            copies[_HEAD] = "model.embed_tokens.weight"
        for copy, original in copies.items():
            if copy in self.tensors:
                self._check_copy(copy, original)
                expected.add(copy)
        modules = mtp_of(self.cfg, self.tensors)
        for name, tensor in self.tensors.items():
            if name not in expected and not name.endswith(_IGNORED):
                hint = f"; {_WITHOUT_MTP}" if name in modules else ""
                raise ValueError(
                    f"{tensor.file}: tensor {plain(name)} does not belong to the model of config.json{hint}"
                )

    def _check_tensor(self, name: str, shape: tuple[int, ...], may_be_fp8: bool) -> set[str]:
        """Checks one tensor, with its scales if it is FP8; returns the names that it accounts for."""
        tensor = self.tensors.get(name)
        if tensor is None:
            hint = f"; {_WITHOUT_MTP}" if mtp_of(self.cfg, [name]) else ""
            raise ValueError(f"{self.path}: tensor {name} of shape {list(shape)} is missing{hint}")
        allowed = ("F32", "BF16", "F8_E4M3") if may_be_fp8 else ("F32", "BF16")
        _check_one(name, tensor, shape, allowed)
        if tensor.dtype != "F8_E4M3":
            return {name}
        scale = self.tensors.get(name + SCALE_SUFFIX)
        if scale is None:
            raise ValueError(f"{tensor.file}: FP8 tensor {name} has no {name + SCALE_SUFFIX}")
        _check_one(name + SCALE_SUFFIX, scale, fp8.scale_shape(shape), _SCALES)
        return {name, name + SCALE_SUFFIX}

    def _check_copy(self, copy: str, original: str) -> None:
        """This model shares the tensor: a copy that differs cannot be represented."""
        way_out = 'or set "tie_word_embeddings": false in config.json' if copy == _HEAD else _WITHOUT_MTP
        a, b = self.tensors[copy], self.tensors[original]
        _check_one(copy, a, b.shape, (b.dtype,))
        x, y = a.read(), b.read()
        rows = max(1, (1 << 24) // max(1, x.strides[0]))
        for start in range(0, len(x), rows):
            if not np.array_equal(
                x[start : start + rows].view(np.uint8), y[start : start + rows].view(np.uint8)
            ):
                raise ValueError(
                    f"{a.file}: tensor {copy} differs from {original}, with which this model shares it, as a fine-tune "
                    f"leaves it that trained one of the two: put a copy of {original} in its place; {way_out}"
                )


def _check_one(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != tuple(shape):
        raise ValueError(
            f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}"
        )
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{tensor.file}: tensor {name} has dtype {plain(tensor.dtype)}, expected one of {list(dtypes)}; save the "
            "checkpoint in one of these first"
        )


def _dtype_for(stored: set[str]) -> np.dtype:
    """Chooses a leaf's dtype: FP8 if all its tensors are, else one that loses no bit; some FP8 counts as BF16."""
    if stored == {"F8_E4M3"}:
        return fp8.E4M3
    return DTYPES["F32"] if "F32" in stored else DTYPES["BF16"]

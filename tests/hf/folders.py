"""Folders of checkpoints: what is compared of them, and how one is changed."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch

from tests.oracle.tiny import V3

# Matrices larger than one FP8 block, with ragged edges in both directions.
WIDE = dataclasses.replace(
    V3, hidden_size=136, intermediate_size=260, kv_lora_rank=130, v_head_dim=43, num_nextn_predict_layers=1
)


def same(a, b) -> None:
    """Equal dtype, shape and bits."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def rewrite(path: Path, change) -> None:
    """Every shard through `change(dict of tensors)`, index kept in step."""
    weight_map = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

"""By what two servers know that the latents of one are those of the other."""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.checks import names_that_differ, shown
from deepseek_jax.model.cache import PAGE

PROTOCOL = 1
_SAMPLES = 64  # numbers of each parameter


@dataclasses.dataclass(frozen=True)
class Identity:
    """What must be equal. page: tokens; layers: in the pages, that of the module which drafts included; width, dtype: of a
    token in a page; weights: `fingerprint` of them, version: theirs in the engine."""

    protocol: int
    page: int
    layers: int
    width: int
    dtype: str
    drafts: bool
    vocab_size: int
    weights: str
    version: int

    def differences(self, there: dict[str, Any]) -> str:
        """What is not equal in another's, in words; empty if nothing is. there: of JSON, from anybody."""
        here = dataclasses.asdict(self)
        return ", ".join(
            f"{name} is {shown(there.get(name))} there and {shown(here.get(name))} here"
            for name in names_that_differ(there, here)[:3]
        )


def identity_of(engine: Any, weights: str) -> Identity:
    """Of a `serving.engine.Engine`, as its weights are now."""
    device = engine.device
    _, layers, _, width = device.block.shape
    return Identity(
        protocol=PROTOCOL,
        page=PAGE,
        layers=layers,
        width=width,
        dtype=str(device.block.dtype),
        drafts=bool(device.drafts),
        vocab_size=device.cfg.vocab_size,
        weights=weights,
        version=engine.version,
    )


def fingerprint(params: Any) -> str:
    """Of a model's parameters, wherever and however they are spread: SHA-256 of their names, shapes and dtypes and of some
    numbers of each, which training, quantising or another checkpoint would change. It reads no whole tensor. Of a mesh over
    several processes, all call it."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, x), numbers in zip(leaves, _some([x for _, x in leaves]), strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {np.shape(x)} {x.dtype}".encode())
        digest.update(np.asarray(numbers).tobytes())
    return digest.hexdigest()[:32]


def _some(arrays: list[Any]) -> list[Any]:
    """Of each, numbers that lie apart in all dims."""

    def of_all(arrays: list[Any]) -> list[Any]:
        return [x[_places(x)] for x in arrays]

    if all(isinstance(x, np.ndarray) for x in arrays):
        return of_all(arrays)
    sharding = arrays[0].sharding
    everywhere = (
        NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    )
    return [x.addressable_data(0) for x in jax.jit(of_all, out_shardings=everywhere)(arrays)]


def _places(x: Any) -> tuple[np.ndarray, ...]:
    n = min(_SAMPLES, max(x.shape, default=1))
    return tuple(np.arange(n) * 7919 % size for size in x.shape)

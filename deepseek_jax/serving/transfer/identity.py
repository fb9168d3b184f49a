"""By what two servers know that the latents of one are those of the other."""

import dataclasses
import hashlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.balancing.plan import Plan
from deepseek_jax.checks import names_that_differ, shown
from deepseek_jax.model.cache import PAGE

PROTOCOL = 1
_SAMPLES = 64  # numbers of each parameter
_OF_EXPERTS = re.compile(r"(w_\w+_)(edf|efd)")


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


def fingerprint(params: Any, plan: Plan | None = None) -> str:
    """Of a model's parameters, wherever and however they are spread: SHA-256 of their names, shapes and dtypes and of some
    numbers of each, which training, quantising or another checkpoint would change. It reads no whole tensor. Of a mesh over
    several processes, all call it. plan: of the slots in which experts lie; the same model has one fingerprint in all."""
    digest = hashlib.sha256()
    parts = _parts(params, plan)
    numbers = _some([part.x for part in parts], [part.places for part in parts])
    for part, some in sorted(zip(parts, numbers, strict=True), key=lambda pair: pair[0].name):
        digest.update(f"{part.name} {part.shape} {part.x.dtype}".encode())
        digest.update(np.asarray(some).tobytes())
    return digest.hexdigest()[:32]


class _Part(NamedTuple):
    """A parameter as the model declares it. places: of numbers that lie apart in all its dims, in the array that has it."""

    name: str
    x: Any
    shape: tuple[int, ...]
    places: tuple[np.ndarray, ...]


def _parts(params: Any, plan: Plan | None) -> list[_Part]:
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if plan is None or "['experts']" not in name:
            found.append(_Part(name, x, np.shape(x), _places(np.shape(x))))
            continue
        layers, _, *rest = np.shape(x)
        slot_le = plan.log2phy[:, :, 0]  # the first of each expert
        slot_le = slot_le[-1:].repeat(layers, 0) if name.startswith("['mtp']") else slot_le[:layers]
        routed = _gated(params)
        layer, expert, *inner = _places((layers, routed, *rest))
        found.append(_Part(name, x, (layers, routed, *rest), (layer, slot_le[layer, expert], *inner)))
        if routed < slot_le.shape[1]:
            shared = _OF_EXPERTS.sub(lambda m: m[1] + m[2].replace("e", ""), name)
            shared = shared.replace("['experts']", "['shared']")
            layer, *inner = _places((layers, *rest))
            found.append(_Part(shared, x, (layers, *rest), (layer, slot_le[layer, -1], *inner)))
    return found


def _gated(params: Any) -> int:
    """Among how many experts the gate chooses."""
    block = params["moe_layers"] if "moe_layers" in params else params["mtp"]["block"]
    return int(block["ffn"]["gate"]["w_gate_de"].shape[-1])


def _some(arrays: list[Any], places: list[tuple[np.ndarray, ...]]) -> list[Any]:
    """The numbers at these places of each."""

    def of_all(arrays: list[Any]) -> list[Any]:
        return [x[at] for x, at in zip(arrays, places, strict=True)]

    if all(isinstance(x, np.ndarray) for x in arrays):
        return of_all(arrays)
    sharding = arrays[0].sharding
    everywhere = (
        NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    )
    return [x.addressable_data(0) for x in jax.jit(of_all, out_shardings=everywhere)(arrays)]


def _places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    n = min(_SAMPLES, max(shape, default=1))
    return tuple(np.arange(n) * 7919 % size for size in shape)

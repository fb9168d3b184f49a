"""Parameters as data: one line per tensor gives name, shape, logical axes and initialiser.

A parameter tree is a nested dict of `Param`, whose logical axes the mesh rules read. From the same tree come the arrays
(`initialise`), their abstract shapes (`abstract`) and the Linen parameters of a module (`declare`). Layers of one kind
carry a leading `layer` axis (`stacked`).
"""

import dataclasses
import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Param:
    """One tensor: shape, logical axes (same length) and initialiser ("normal", "ones" or "zeros").

    n_in: of the weight of a linear layer that FP8 policies quantise, how many dims are its input, after layer and
    expert; None for what keeps BF16 or FP32 (embedding, head, gate, norms).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    n_in: int | None = None

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)


Tree = Any  # nested dict of Param, or of arrays of the same structure


def _is_param(x: Any) -> bool:
    return isinstance(x, Param)


def tree_map(fn: Any, tree: Tree, *rest: Any) -> Any:
    """`jax.tree.map` over the `Param` leaves of `tree`."""
    return jax.tree.map(fn, tree, *rest, is_leaf=_is_param)


def tree_map_with_name(fn: Any, tree: Tree) -> Any:
    """`fn(name, param)` over the `Param` leaves, named by their path: "moe_layers.ffn.gate.w_gate_de"."""

    def named(path: Any, p: Param) -> Any:
        return fn(jax.tree_util.keystr(path, simple=True, separator="."), p)

    return jax.tree_util.tree_map_with_path(named, tree, is_leaf=_is_param)


def stacked(tree: Tree, n: int) -> Tree:
    """The same tensors for `n` layers, stacked on a leading `layer` axis."""
    return tree_map(lambda p: dataclasses.replace(p, shape=(n, *p.shape), axes=("layer", *p.axes)), tree)


def _one(x: Any, i: int) -> jax.Array:
    """x[i]: in the memory of CPUs the same bytes where these are aligned, else a copy."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return x[i]
    (device, *others) = x.devices()
    if others or device.platform != "cpu":
        return x[i]
    return jax.device_put(np.asarray(x)[i], device if x.committed else None, may_alias=True)


def layers_apart(tree: Any, n: int) -> list[Any]:
    """The first `n` of the trees that `tree` stacks on the leading axis of its arrays: layers, or experts of a layer."""
    return [jax.tree.map(lambda x, i=i: _one(x, i), tree) for i in range(n)]


def abstract(tree: Tree, dtype: Any = jnp.float32) -> Any:
    """Tree of `jax.ShapeDtypeStruct`."""
    return tree_map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), tree)


def count(tree: Tree) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(tree, is_leaf=_is_param))


def initialise(key: jax.Array, tree: Tree, std: float, dtype: Any = jnp.float32) -> Any:
    """Arrays for a tree of `Param`: normal with deviation `std` (report section 4.2: 0.006), ones or zeros.

    A tensor's key depends on its path only, so adding a tensor leaves the others as they were.
    """

    def one(path, p):
        if p.init != "normal":
            return jnp.full(p.shape, 1.0 if p.init == "ones" else 0.0, dtype)
        name = jax.tree_util.keystr(path)
        return std * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), p.shape, dtype)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_param)


def declare(module: nn.Module, tree: Tree, std: float) -> Any:
    """The Linen parameters of `module` for `tree`, as a nested dict of arrays."""
    return {name: module.param(name, initialise, sub, std) for name, sub in tree.items()}

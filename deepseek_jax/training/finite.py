"""`not_finite` finds the arrays of a tree with NaN or infinity, on the devices or in host memory, where they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.parallel.processes.together import on_host

PyTree = Any


class NonFiniteError(RuntimeError):
    """NaN or infinity, from which a run cannot go on: in too many steps in a row, or in its state."""


def all_finite(tree: PyTree) -> jax.Array:
    """bool []: no NaN and no infinity in any array of floats. One read of the tree; for use under jit."""
    return jnp.stack(_flags(tree)).all()


def not_finite(tree: PyTree) -> list[str]:
    """Paths of the arrays with NaN or infinity. All processes that hold a part of `tree` must call it.

    One program reads every array on the devices once, at the speed of their memory; only one bit per array comes to the
    host. NumPy arrays are read by the host.
    """
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if _is_float(x)
    }
    there = {name: x for name, x in arrays.items() if isinstance(x, jax.Array)}
    flags = on_host(_each_finite(list(there.values()))) if there else np.zeros(0, bool)
    finite = dict(zip(there, flags, strict=True))
    return [
        name for name, x in arrays.items() if not (finite[name] if name in finite else np.isfinite(x).all())
    ]


@jax.jit
def _each_finite(tree: PyTree) -> jax.Array:
    return jnp.stack(_flags(tree))


def _flags(tree: PyTree) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if _is_float(x)]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)

"""What parts of a batch add to the metrics of a step: micro-batches one after the other, devices side by side.

A metric is a sum of the parts' (each divided by what the whole batch has), or, where its name ends in MAX, the largest of
theirs, 0 or more.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MAX = "_max"


def _largest(path: Any) -> bool:
    return str(getattr(path[-1], "key", "")).endswith(MAX)


def plus(a: Any, b: Any) -> Any:
    """Of two parts, trees of metrics and counts."""

    def one(path: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a, b) if _largest(path) else a + b

    return jax.tree_util.tree_map_with_path(one, a, b)


def over_devices(parts: Any, axes: Any) -> Any:
    """Of the devices along mesh axes, inside `shard_map`. Not to be differentiated."""

    def one(path: Any, x: jax.Array) -> jax.Array:
        return lax.pmax(x, axes) if _largest(path) else lax.psum(x, axes)

    return jax.tree_util.tree_map_with_path(one, parts)

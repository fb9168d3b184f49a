"""Rings: places for what waits between two ops of a rank, as many as a schedule ever needs at once.

Whatever waits is written into flat arrays, one per dtype, so that stages of different content share the same memory: a
ring is as large as its largest content, not as the sum of all.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Ring = dict[str, jax.Array]  # dtype -> [place, elements]


class Form:
    """How trees of one structure lie in a ring. What is there twice, the same array, is kept once.

    tree: of arrays, as it is to be written; `jax.eval_shape` may be running.
    """

    def __init__(self, tree: Any):
        leaves, self._tree = jax.tree.flatten(tree)
        first: dict[int, int] = {}
        self._which = [first.setdefault(id(x), len(first)) for x in leaves]
        unique = [leaves[self._which.index(i)] for i in range(len(first))]
        self.shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in unique]
        self._starts: list[int] = []
        ends: dict[str, int] = {}
        for s in self.shapes:
            name = jnp.dtype(s.dtype).name
            self._starts.append(ends.get(name, 0))
            ends[name] = ends.get(name, 0) + math.prod(s.shape)
        self.elements: dict[str, int] = ends

    def write(self, ring: Ring, place: jax.Array, tree: Any) -> Ring:
        """The ring with a tree at a place."""
        ring, leaves = dict(ring), jax.tree.leaves(tree)
        for i, (s, start) in enumerate(zip(self.shapes, self._starts, strict=True)):
            name, x = jnp.dtype(s.dtype).name, leaves[self._which.index(i)]
            ring[name] = lax.dynamic_update_slice(ring[name], x.reshape(1, -1), (place, start))
        return ring

    def read(self, ring: Ring, place: jax.Array) -> Any:
        """The tree at a place."""
        arrays = []
        for s, start in zip(self.shapes, self._starts, strict=True):
            size = math.prod(s.shape)
            x = lax.dynamic_slice(ring[jnp.dtype(s.dtype).name], (place, start), (1, size))
            arrays.append(x.reshape(s.shape))
        return jax.tree.unflatten(self._tree, [arrays[i] for i in self._which])


def ring(places: int, forms: Sequence[Form]) -> Ring:
    """An empty ring for trees of all these forms."""
    names = sorted({name for form in forms for name in form.elements})
    most = {name: max(form.elements.get(name, 0) for form in forms) for name in names}
    return {name: jnp.zeros((places, n), name) for name, n in most.items()}

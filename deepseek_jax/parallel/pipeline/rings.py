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

Ring = dict[str, jax.Array]  # dtype, with a number where one array is too small -> [place, elements]
_MOST = 2**31 - 1  # elements of a place: XLA is given offsets as int32


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
        self._where: list[tuple[str, int]] = []
        self.elements: dict[str, int] = {}
        for s in self.shapes:
            kind, size, number = jnp.dtype(s.dtype).name, math.prod(s.shape), 0
            while self.elements.get(name := f"{kind}.{number}" if number else kind, 0) + size > _MOST:
                number += 1
            self._where.append((name, self.elements.get(name, 0)))
            self.elements[name] = self._where[-1][1] + size

    def write(self, ring: Ring, place: jax.Array, tree: Any) -> Ring:
        """The ring with a tree at a place."""
        ring, leaves = dict(ring), jax.tree.leaves(tree)
        for i, (name, start) in enumerate(self._where):
            x = leaves[self._which.index(i)]
            ring[name] = lax.dynamic_update_slice(ring[name], x.reshape(1, -1), (place, start))
        return ring

    def read(self, ring: Ring, place: jax.Array) -> Any:
        """The tree at a place."""
        arrays = []
        for s, (name, start) in zip(self.shapes, self._where, strict=True):
            x = lax.dynamic_slice(ring[name], (place, start), (1, math.prod(s.shape)))
            arrays.append(x.reshape(s.shape))
        return jax.tree.unflatten(self._tree, [arrays[i] for i in self._which])


def ring(places: int, forms: Sequence[Form]) -> Ring:
    """An empty ring for trees of all these forms."""
    names = sorted({name for form in forms for name in form.elements})
    most = {name: max(form.elements.get(name, 0) for form in forms) for name in names}
    return {name: jnp.zeros((places, n), name.split(".")[0]) for name, n in most.items()}

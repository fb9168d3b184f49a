"""Rings: places for what waits between two ops of a rank, as many as a schedule ever needs at once, and one more that
takes what nobody wants.

Whatever waits is laid out flat, an array per dtype, so that stages of different content share the same memory: a place is
as large as the largest content, not as the sum of all.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Flat = dict[str, jax.Array]  # dtype, with a number where one array is too small -> [elements]
Ring = dict[str, jax.Array]  # the same -> [place, elements]
_MOST = 2**31 - 1  # elements of a place: XLA is given offsets as int32


class Form:
    """How trees of one structure lie in a place. What is there twice, the same array, is kept once.

    tree: of arrays, as it is to be laid out; `jax.eval_shape` may be running.
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

    def laid_out(self, tree: Any, widths: Mapping[str, int]) -> Flat:
        """A tree in arrays of these widths, filled up with zeros."""
        leaves = jax.tree.leaves(tree)
        parts: dict[str, list[jax.Array]] = {name: [] for name in widths}
        for i, (name, _) in enumerate(self._where):
            parts[name].append(leaves[self._which.index(i)].reshape(-1))
        for name, width in widths.items():
            parts[name].append(jnp.zeros(width - self.elements.get(name, 0), _dtype(name)))
        return {name: jnp.concatenate(xs) for name, xs in parts.items()}

    def read(self, flat: Flat) -> Any:
        """The inverse."""
        arrays = []
        for s, (name, start) in zip(self.shapes, self._where, strict=True):
            arrays.append(lax.slice_in_dim(flat[name], start, start + math.prod(s.shape)).reshape(s.shape))
        return jax.tree.unflatten(self._tree, [arrays[i] for i in self._which])


def _dtype(name: str) -> str:
    return name.split(".")[0]


def widths(forms: Iterable[Form]) -> dict[str, int]:
    """Of a place for trees of all these forms."""
    found: dict[str, int] = {}
    for form in forms:
        for name, n in form.elements.items():
            found[name] = max(found.get(name, 0), n)
    return dict(sorted(found.items()))


def nothing(widths: Mapping[str, int]) -> Flat:
    """Zeros."""
    return {name: jnp.zeros(width, _dtype(name)) for name, width in widths.items()}


def ring(places: int, widths: Mapping[str, int]) -> Ring:
    """An empty ring; of no places, none at all."""
    return {name: jnp.zeros((places + 1, width), _dtype(name)) for name, width in widths.items() if places}


def put(into: Any, place: jax.Array, what: Any) -> Any:
    """The ring with what a place is to hold; place -1: with nothing that anybody reads."""

    def one(x: jax.Array, new: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(x, new, jnp.where(place < 0, len(x) - 1, place), 0)

    return jax.tree.map(one, into, what)


def take(ring: Any, place: jax.Array) -> Any:
    """What a place holds; place -1: anything."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, place, 0, keepdims=False), ring)

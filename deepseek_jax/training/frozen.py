"""Parameters that a run leaves as they are: `train.frozen`, a regular expression over their paths."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax

from deepseek_jax.model.params import Tree, tree_map_with_name

PyTree = Any


def frozen_leaves(pattern: str, params: Tree) -> PyTree:
    """Tree of bools like `params` (of `Param`): True where `pattern` is found in the path, as "moe_layers.ffn.gate".

    A frozen parameter gets no update and no weight decay, its moments stay, and its gradient counts neither in the
    norm by which gradients are clipped nor in the test for NaN. Empty: nothing is frozen.

    Raises ValueError for what is no regular expression, one that matches nothing (each side of a "|" that stands for
    itself is looked at alone), naming the nearest paths, and one that leaves nothing to train.
    """
    names = jax.tree.leaves(tree_map_with_name(lambda name, _: name, params))
    if pattern:
        for part in _parts(pattern):
            if not any(part.search(name) for name in names):
                close = difflib.get_close_matches(part.pattern, _prefixes(names), n=3, cutoff=0.3)
                near = ", ".join(close or names[:3])
                raise ValueError(
                    f"train.frozen={pattern!r}: {part.pattern!r} is in no parameter's path; near: {near}"
                )
        if all(re.search(pattern, name) for name in names):
            raise ValueError(f"train.frozen={pattern!r} matches every parameter: nothing is left to train")
    return tree_map_with_name(lambda name, _: bool(pattern) and bool(re.search(pattern, name)), params)


def trained(tree: PyTree, frozen: PyTree) -> list[Any]:
    """The leaves of `tree` that are not frozen."""
    return [x for x, stays in zip(jax.tree.leaves(tree), jax.tree.leaves(frozen), strict=True) if not stays]


def _parts(pattern: str) -> list[re.Pattern]:
    try:
        whole = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"train.frozen={pattern!r} is no regular expression: {error}") from error
    try:
        return [re.compile(part) for part in pattern.split("|")]
    except re.error:  # the "|" stands inside parentheses
        return [whole]


def _prefixes(names: Sequence[str]) -> list[str]:
    """All paths and the beginnings of paths: "moe_layers.ffn" too."""
    found = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
    return sorted(found)

"""Programs for windows of several lengths: a batch of short answers is not computed at the length of the longest one."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.config import Config


class ByLength:
    """A function of a batch, made for each length of windows when the first batch of that length comes.

    Args:
        make: (config, mesh) -> the jitted function for windows of `data.seq_len` tokens.
        at: which of its arguments is the batch.
    """

    def __init__(self, make: Callable[[Any, Any], Any], cfg: Config, mesh: Mesh | AbstractMesh, at: int):
        self._make, self._cfg, self._mesh, self._at = make, cfg, mesh, at
        self._made: dict[int, Any] = {}

    def __call__(self, *args: Any) -> Any:
        return self._of(args)(*args)

    def trace(self, *args: Any) -> Any:
        """Of abstract arguments."""
        return self._of(args).trace(*args)

    def _of(self, args: Any) -> Any:
        length = args[self._at]["tokens"].shape[1] - 1
        if length not in self._made:
            self._made[length] = self._make(_of_length(self._cfg, length), self._mesh)
        return self._made[length]


def _of_length(cfg: Config, length: int) -> Config:
    """A checked config with shorter windows. It is not checked again: the longest answer need not fit into them."""
    shorter = copy.copy(cfg)
    object.__setattr__(shorter, "data", dataclasses.replace(cfg.data, seq_len=length))
    return shorter

"""What the warpgroups of a thread block share: sizes, references, the walk over its part of the plan."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

ROWS = 64  # of queries per thread block: those of one wgmma
PAGE = 64
ROPE = 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is known when the kernel is traced.

    Attributes:
      fp8: kind of the cache.
      parts: of the plan.
      queries, heads: of a sequence; a row is a query token and a head of it.
      pages_per_entry: pages of 64 keys in one of the block table.
      scale: of scores in units of log 2.
    """

    fp8: bool
    latent: int
    parts: int
    queries: int
    heads: int
    pages_per_entry: int
    scale: float

    @property
    def keys(self) -> int:
        """Keys that one warpgroup scores in a step: a page, or half of one."""
        return PAGE // 2 if self.fp8 else PAGE

    @property
    def step(self) -> int:
        return 2 * self.keys


@dataclasses.dataclass(frozen=True)
class Inputs:
    """References to global memory; `pages` as `kernel._views` made them."""

    q: Any
    pages: Any
    table: Any
    lengths: Any
    part_length: Any
    start: Any
    first: Any
    last: Any


@dataclasses.dataclass(frozen=True)
class Outputs:
    """References to global memory: of whole sequences, and of pieces."""

    out: Any
    lse: Any
    piece: Any
    piece_lse: Any


def hidden_zero(index):
    """0, of a loop's index, without the compiler knowing. An address with it is computed where it is used: the compiler
    would compute all that do not change ahead of the loop, some hundred, and has no registers to keep them."""
    return lax.min(index, 0)


@dataclasses.dataclass(frozen=True)
class Block:
    """One thread block: 64 rows of queries, over a part of the plan.

    scratch, by name: `outputs`: the queries; in their place, with the log-sum-exp, the outputs in BF16, or in float32 half of
    each half at a time. Of both pages of a step, one below the other, `latents`, the left half and the right one, with
    barrier 2 * page + half each, and `tails`, rotary keys. `tops`: the maximum that each warpgroup publishes, at the
    end its sum. `probs`: probabilities that it publishes; with a BF16 cache they take the place of the tails. `raw`,
    `raw_tail`: an FP8 page's latents, of two steps, and rotary keys as they lie in memory.
    """

    shape: Shape
    inputs: Inputs
    outs: Outputs
    scratch: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.scratch[name]

    @property
    def rows(self):
        return pl.ds(lax.axis_index("rows") * ROWS, ROWS)

    def half(self, w):
        """Columns of half w of the latent."""
        return pl.ds(w * (self.shape.latent // 2), self.shape.latent // 2)

    def query(self, zero):
        """The queries. `zero` here and below: of `hidden_zero`."""
        return self.outputs[0].at[zero]

    def latent(self, page, half, zero=0):
        """Half of the latents of a page."""
        return self.latents.at[half, pl.ds((page + zero) * self.shape.keys, self.shape.keys)]

    def tail(self, page, zero=0):
        """The rotary keys of a page."""
        return self.tails.at[pl.ds((page + zero) * self.shape.keys, self.shape.keys)]

    def prob(self, page, zero):
        """Where the probabilities of a page are."""
        return (self.probs if self.shape.fp8 else self.tails).at[pl.ds((page + zero) * ROWS, ROWS)]

    def each_sequence(self, do: Callable) -> None:
        """Calls do(sequence, first step, last step excluded, piece): -1 where the part has all of its steps."""
        part, inputs, step = lax.axis_index("part"), self.inputs, self.shape.step
        begin = part * inputs.part_length[0]

        @pl.loop(inputs.first[part], inputs.last[part])
        def _(b):
            steps = lax.max(lax.div(inputs.lengths[b] + step - 1, step), 1)
            offset = begin - inputs.start[b]
            first, last = lax.max(offset, 0), lax.min(offset + inputs.part_length[0], steps)
            piece = jnp.where(first == 0, jnp.where(last == steps, -1, self.shape.parts + part), part)
            do(b, first, last, piece)

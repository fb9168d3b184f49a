"""Weights of one input, multiplied side by side: gate and up; the down-projections of queries and of keys and values.

`Joined` multiplies by one array that holds them all, made once per step, or once per model: the input is read, and
quantised, once, and so is the gradient of the output. `Apart` multiplies by each of them: float32 models, which CPUs
run and where a product gains nothing by being wider; and FP8 weights of which a block of 128 would reach into the next.

Outputs of `Joined` lie beside each other in the last dim; those of `Apart`, here called sides, are a tuple.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.precision.operands import Operand, rows_between
from deepseek_jax.precision.policy import Policy
from deepseek_jax.precision.product import Plain, Quantised, product_of_gradient
from pallas_kernels.blocks import BLOCK
from pallas_kernels.groups import Groups

Sides = tuple[Any, ...]


class _Beside(abc.ABC):
    """What both have in common: the input is an operand of the first product, as of any other."""

    @property
    @abc.abstractmethod
    def _first(self) -> Any:
        """The product that says how an input is packed."""

    @property
    def experts(self) -> int:
        return self._first.experts

    def operand(self, x: jax.Array) -> Any:
        return self._first.operand(x)

    def from_dispatch(self, x: jax.Array, sent: Any = None, form: str = "") -> Any:
        return self._first.from_dispatch(x, sent, form)

    def take(self, a: Any, index_m: jax.Array) -> Any:
        return self._first.take(a, index_m)

    def kept(self, a: Any) -> Any:
        return self._first.kept(a)


@flax.struct.dataclass
class Joined(_Beside):
    """whole: the product of the joined weight, [in, sum of out] or of experts [e, in, sum of out]; it takes no gradient.
    masters: the weights, in the shapes of the parameters, which take theirs and are not read; () for inference.
    adds: as of `Quantised`, which `whole` then is."""

    whole: Any
    masters: tuple[jax.Array, ...]
    shapes: tuple[tuple[int, ...], ...] | None = flax.struct.field(pytree_node=False, default=None)
    adds: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def _first(self) -> Any:
        return self.whole

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    def kept_for_backward(self) -> "Joined":
        """As `Quantised`: of the masters, empty arrays say the dtype."""
        shapes = tuple(w.shape for w in self.masters)
        empty = tuple(jnp.zeros((0,), w.dtype) for w in self.masters)
        return Joined(self.whole.kept_for_backward(), self.masters if self.adds else empty, shapes, self.adds)

    def onto(self, gradient: "Joined") -> "Joined":
        """As `Quantised.onto`."""
        return dataclasses.replace(self, masters=gradient.masters)

    def fprop(self, a: Any, dtype: Any, groups: Groups | None = None) -> jax.Array:
        return self.whole.fprop(a, dtype, groups)

    def array(self, dtype: Any) -> jax.Array:
        return self.whole.array(dtype)

    def packed(self, y: jax.Array) -> Any:
        return self.whole.packed(y)

    def unpacked(self, kept: Any, dtype: Any) -> Sides:
        """Of two sides as wide as each other."""
        return tuple(jnp.split(self.whole.unpacked(kept, dtype), 2, axis=-1))

    def together(self, *sides: jax.Array) -> jax.Array:
        """Gradients of the sides as that of the output."""
        return jnp.concatenate(sides, axis=-1)

    def dgrad(self, dy: jax.Array, dtype: Any, groups: Groups | None = None) -> jax.Array:
        return self.whole.dgrad(dy, dtype, groups)

    def wgrad(self, a: Any, dy: jax.Array, groups: Groups | None = None) -> "Joined":
        """One product, of which each master takes its columns; a product for each of those that add, where they lie."""
        assert self.shapes is not None
        a, widths = (
            self.whole.along_tokens(a, dy, groups),
            [_width(s, groups is not None) for s in self.shapes],
        )
        ends = np.cumsum(widths).tolist()
        if self.adds:
            along = self.whole.gradient_along_tokens(dy)
            rows = (rows_between(along, end - width, end) for width, end in zip(widths, ends, strict=True))
            parts = [product_of_gradient(a, d, groups, w) for d, w in zip(rows, self.masters, strict=True)]
        else:
            parts = jnp.split(self.whole.dw(a, dy, groups), ends[:-1], -1)
        masters = zip(parts, self.shapes, self.masters, strict=True)
        return Joined(None, tuple(p.reshape(s).astype(w.dtype) for p, s, w in masters), adds=self.adds)


def _width(shape: tuple[int, ...], of_experts: bool) -> int:
    """Columns of a weight [in, out], or [e, in, out]."""
    return math.prod(shape[of_experts + 1 :])


@flax.struct.dataclass
class Apart(_Beside):
    """parts: the products of two weights, each of which takes its gradient."""

    parts: tuple[Any, Any]

    @property
    def _first(self) -> Any:
        return self.parts[0]

    def kept_for_backward(self) -> "Apart":
        return Apart(tuple(w.kept_for_backward() for w in self.parts))  # type: ignore[arg-type]

    def fprop(self, a: Any, dtype: Any, groups: Groups | None = None) -> Sides:
        return tuple(w.fprop(a, dtype, groups) for w in self.parts)

    def array(self, dtype: Any) -> Sides:
        return tuple(w.array(dtype) for w in self.parts)

    def packed(self, y: Sides) -> Sides:
        return tuple(w.packed(side) for w, side in zip(self.parts, y, strict=True))

    def unpacked(self, kept: Sides, dtype: Any) -> Sides:
        return tuple(w.unpacked(side, dtype) for w, side in zip(self.parts, kept, strict=True))

    def together(self, *sides: jax.Array) -> Sides:
        return sides

    def dgrad(self, dy: Sides, dtype: Any, groups: Groups | None = None) -> jax.Array:
        """Added up in float32."""
        first, second = self.parts
        return first.dgrad_of_two(second, *dy, dtype, groups)

    def wgrad(self, a: Any, dy: Sides, groups: Groups | None = None) -> "Apart":
        """The input is laid along the tokens once."""
        a = self.parts[0].along_tokens(a, dy[0], groups)
        return Apart(tuple(w.wgrad_along(a, d, groups) for w, d in zip(self.parts, dy, strict=True)))  # type: ignore[arg-type]


# --- joining ------------------------------------------------------------------------------------------------------


def can_join(operands: Sequence[Operand]) -> bool:
    """Whether blocks of 128 of the operands of fprop [..., out, in] lie in one weight each."""
    return all(x.format.fine for x in operands) and all(x.q.shape[-2] % BLOCK == 0 for x in operands[:-1])


def join_operands(operands: Sequence[Operand], axis: int) -> Operand:
    """The operand of the joined weight, bit for bit; the outputs lie along `axis`."""
    q = jnp.concatenate([x.q for x in operands], axis)
    return Operand(q, jnp.concatenate([x.scale for x in operands], axis), operands[0].format)


def joined(
    operands: Any, masters: tuple[jax.Array, ...], policy: Policy | None, adds: bool = False
) -> Joined:
    """The product of joined operands of fprop and dgrad, or of an array [..., in, sum of out] in the dtype of the product.
    adds: see `Joined`."""
    if policy is None:
        return Joined(Plain(operands), masters)
    fprop, dgrad = operands
    return Joined(Quantised(None, fprop, dgrad, policy), masters, adds=adds)

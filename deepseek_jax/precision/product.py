"""A weight brings its product along: what a layer multiplies by, forward and backward, whatever its precision.

A linear layer has three GEMMs (report figure 6): fprop y = x W, dgrad dx = dy W^T, wgrad dW = x^T dy. Layers
(`model/layers.py`, `model/ffn.py`, `model/attention.py`) are written once over products: `Plain` multiplies arrays as
they are, `Quantised` multiplies FP8 operands by a policy and keeps FP8 for the backward pass. Of a quantised weight the
operands are made once per step, outside the loop over micro-batches. Each GEMM's operands are quantised on their own:
an activation that the forward pass saved in FP8 is dequantised, transposed and quantised again along the tokens.

The left operand `a` of a product is an array for `Plain`, an `Operand` for `Quantised`. With `groups`, the weight is that
of several experts [e, in, out], and the rows of `a` are sorted by expert.

Dims: m row (token), e expert.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.precision import e5m6
from deepseek_jax.precision.operands import (
    Format,
    Operand,
    along_rows,
    copies,
    dequantise,
    keep,
    multiply,
    multiply_groups,
    quantise,
    restore,
    sum_of_two,
    take_rows,
    transpose,
)
from deepseek_jax.precision.policy import Policy
from deepseek_jax.precision.sums import precision
from pallas_kernels.grouped_gemm.ops import grouped_gemm, grouped_wgrad
from pallas_kernels.groups import Groups
from pallas_kernels.quantize.ops import swiglu_quantize


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, the gated activation of every FFN, in the dtype that the arguments promote to."""
    return jax.nn.silu(gate) * up


def sides(gate_up: Any) -> Any:
    """Gate and up, which are two arrays, or lie beside each other in the last dim."""
    return gate_up if isinstance(gate_up, tuple) else jnp.split(gate_up, 2, axis=-1)


def _transposed(a_mi: jax.Array) -> jax.Array:
    """a^T as the left operand of a product. CPUs multiply one that lies transposed at half the speed: there it is copied."""
    return lax.platform_dependent(
        a_mi, cpu=lambda a: lax.optimization_barrier(a.T), default=lambda a: jnp.swapaxes(a, 0, 1)
    )


@flax.struct.dataclass
class Plain:
    """A weight multiplied as it is, cast to the dtype of the product.

    w: [in dims, out dims], the first `n_in` of which are contracted; or of several experts [e, in, out].
    """

    w: jax.Array
    n_in: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def experts(self) -> int:
        return self.w.shape[0]

    def _matrix(self, dtype: Any, groups: Groups | None) -> jax.Array:
        """[in, out], or of experts [e, in, out]."""
        w = self.w.astype(dtype)
        return w if groups is not None else w.reshape(math.prod(w.shape[: self.n_in]), -1)

    def operand(self, x: jax.Array) -> jax.Array:
        """x [..., in dims] as a left operand of fprop. It stays as it is: reshaped, it would be saved a second time."""
        return x

    def from_dispatch(self, x: jax.Array, sent: Any = None, form: str = "") -> jax.Array:
        """Tokens as they come to experts as a left operand of fprop; `sent`: quantised, as they travelled in `form`."""
        return x

    def gradient_from_dispatch(self, dy: jax.Array) -> jax.Array:
        """Gradients as they come to experts as a left operand of dgrad."""
        return dy

    def swiglu(self, gate_up: Any, gain_m: jax.Array | None) -> jax.Array:
        """silu(gate) * up (* gain) as a left operand of fprop, given what `sides` takes."""
        act = swiglu(*sides(gate_up))
        return act if gain_m is None else act * gain_m[:, None].astype(act.dtype)

    def take(self, a: jax.Array, index_m: jax.Array) -> jax.Array:
        """Copies of rows of a left operand; zeros for an index behind the last."""
        return copies(a, index_m)

    def kept(self, a: jax.Array) -> jax.Array:
        """A left operand as the forward pass keeps it for `wgrad`."""
        return a

    def packed(self, x: jax.Array) -> jax.Array:
        """An activation as the forward pass keeps it for arithmetic that is no product."""
        return x

    def packed_output(self, x: jax.Array) -> jax.Array:
        """`packed` for the output of the attention core."""
        return x

    def unpacked(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Inverse of both."""
        return x

    def kept_for_backward(self) -> Self:
        """What the backward pass needs of this weight."""
        return self

    def array(self, dtype: Any) -> jax.Array:
        """The weight in the shape of the parameter."""
        return self.w.astype(dtype)

    def fprop(self, a: jax.Array, dtype: Any, groups: Groups | None = None) -> jax.Array:
        """a W [m, out] in `dtype`."""
        w = self._matrix(dtype, groups)
        if groups is not None:
            return grouped_gemm(a.astype(dtype), w, groups.group_m, transpose_b=False)
        return jnp.matmul(a.astype(dtype).reshape(-1, len(w)), w, precision=precision(dtype))

    def dgrad(self, dy: jax.Array, dtype: Any, groups: Groups | None = None) -> jax.Array:
        """dy W^T [m, in] in `dtype`."""
        w = self._matrix(dy.dtype, groups)
        if groups is not None:
            return grouped_gemm(dy, w, groups.group_m, out_dtype=dtype)
        wide = jnp.promote_types(dy.dtype, dtype)
        dy_mo, exact = dy.reshape(-1, w.shape[1]), precision(dy.dtype)
        return jnp.matmul(dy_mo, w.T, precision=exact, preferred_element_type=wide).astype(dtype)

    def dgrad_of_two(
        self, other: Self, dy: jax.Array, dy_other: jax.Array, dtype: Any, groups: Groups | None = None
    ) -> jax.Array:
        """The gradient [m, in] of an input of two weights apart, added up in float32."""
        if groups is None:
            return (self.dgrad(dy, jnp.float32) + other.dgrad(dy_other, jnp.float32)).astype(dtype)
        # One product of both depths: their sum stays in the float32 accumulator.
        w = jnp.concatenate([part._matrix(dy.dtype, groups) for part in (self, other)], axis=-1)
        return grouped_gemm(jnp.concatenate([dy, dy_other], axis=-1), w, groups.group_m, out_dtype=dtype)

    def along_tokens(self, a: jax.Array, dy: jax.Array, groups: Groups | None = None) -> jax.Array:
        """a as a left operand of `dw`: [m, in] of several experts, else transposed."""
        a = a.astype(dy.dtype)
        return a if groups is not None else _transposed(a.reshape(-1, math.prod(self.w.shape[: self.n_in])))

    def dw(self, a: jax.Array, dy: jax.Array, groups: Groups | None = None) -> jax.Array:
        """a^T dy [in, out] or [e, in, out], float32, given a `along_tokens`."""
        if groups is not None:
            return grouped_wgrad(a, dy, groups.sizes_e)
        dy_mo, exact = dy.reshape(-1, self.w.size // len(a)), precision(dy.dtype)
        return jnp.matmul(a, dy_mo, precision=exact, preferred_element_type=jnp.float32)

    def as_gradient(self, dw: jax.Array) -> Self:
        """`dw` as the cotangent of this weight."""
        return dataclasses.replace(self, w=dw.reshape(self.w.shape).astype(self.w.dtype))

    def wgrad(self, a: jax.Array, dy: jax.Array, groups: Groups | None = None) -> Self:
        """a^T dy, accumulated in float32, as the cotangent of this weight."""
        return self.wgrad_along(self.along_tokens(a, dy, groups), dy, groups)

    def wgrad_along(self, a: jax.Array, dy: jax.Array, groups: Groups | None = None) -> Self:
        """`wgrad`, given a `along_tokens`."""
        return self.as_gradient(self.dw(a, dy, groups))


@flax.struct.dataclass
class Quantised:
    """A weight multiplied in FP8 by a policy; the methods are those of `Plain`.

    master: float32, in the shape of the parameter; it takes the gradient and is not read. None for inference, and where
    others take it (`beside.py`).
    fprop_operand: [..., out, in]; dgrad_operand: [..., in, out], None for inference. Leading layer and expert dims are
    allowed. adds: the master is a sum of gradients, float32; its own gradient is that sum with this one, which the weight
    gradient's product adds where it lies. For weights that a differentiated function multiplies by once.
    """

    master: jax.Array | None
    fprop_operand: Operand | None
    dgrad_operand: Operand | None
    policy: Policy = flax.struct.field(pytree_node=False)
    master_shape: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    adds: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        if self.master_shape is not None:
            return self.master_shape
        if self.master is not None:
            return self.master.shape
        assert self.fprop_operand is not None
        return self.fprop_operand.q.shape[:-3:-1]

    @property
    def experts(self) -> int:
        operand = self.fprop_operand if self.dgrad_operand is None else self.dgrad_operand
        assert operand is not None
        return operand.q.shape[0]

    def operand(self, x: jax.Array) -> Operand:
        assert self.fprop_operand is not None
        return quantise(x.reshape(-1, self.fprop_operand.q.shape[-1]), self.policy.fprop[0])

    def from_dispatch(self, x: jax.Array, sent: Any = None, form: str = "") -> Operand:
        """Tokens that travelled in the format of the policy are multiplied as they came; x is then not read."""
        fmt = self.policy.expert_input
        if sent is None or form != self.policy.dispatch:
            return quantise(x, fmt)
        return Operand(sent[0], sent[1], fmt)

    def gradient_from_dispatch(self, dy: jax.Array) -> Operand:
        fmt = self.policy.expert_input
        return quantise(dy, fmt if self.policy.dgrad[0].rows == fmt.rows else self.policy.dgrad[0])

    def swiglu(self, gate_up: Any, gain_m: jax.Array | None) -> Operand:
        """In one pass where the format allows."""
        fmt = self.policy.fprop[0]
        if fmt.fine and fmt.rows == 1:
            gate, up = gate_up if isinstance(gate_up, tuple) else (gate_up, None)
            return Operand(*swiglu_quantize(gate, up, gain_m, fmt.scale), fmt)
        gate, up = sides(gate_up)
        act = swiglu(gate.astype(jnp.float32), up.astype(jnp.float32))
        return quantise(act if gain_m is None else act * gain_m[:, None], fmt)

    def take(self, a: Operand, index_m: jax.Array) -> Operand:
        return take_rows(a, index_m)

    def kept(self, a: Operand) -> Operand:
        return keep(a)

    def packed(self, x: jax.Array) -> Operand:
        return keep(quantise(x, self.policy.fprop[0]))

    def packed_output(self, x: jax.Array) -> Operand | e5m6.E5M6:
        """In E5M6 (report section 3.3.3), or FP8 where the policy says so."""
        x = x.reshape(-1, self.operand_width)
        return e5m6.encode(x) if self.policy.saved_attention == "e5m6" else self.packed(x)

    @property
    def operand_width(self) -> int:
        """Channels that a product contracts."""
        if self.dgrad_operand is not None:
            return self.dgrad_operand.q.shape[-2]
        assert self.fprop_operand is not None
        return self.fprop_operand.q.shape[-1]

    def unpacked(self, x: Operand | e5m6.E5M6, dtype: Any) -> jax.Array:
        if isinstance(x, Operand):
            return dequantise(restore(x), dtype)
        return e5m6.decode(x, self.operand_width, dtype)

    def kept_for_backward(self) -> Self:
        """Not the operand of fprop, nor the master, unless it adds; an empty array says its dtype."""
        if self.dgrad_operand is None:  # for inference: nothing runs backward
            return self
        if self.master is None:
            return dataclasses.replace(self, fprop_operand=None)
        master = self.master if self.adds else jnp.zeros((0,), self.master.dtype)
        return dataclasses.replace(self, master=master, fprop_operand=None, master_shape=self.master.shape)

    def array(self, dtype: Any) -> jax.Array:
        """Dequantised; of layers stacked on a leading axis, each in the shape of the parameter."""
        assert self.fprop_operand is not None
        w_io = jnp.swapaxes(dequantise(self.fprop_operand, dtype), -1, -2)
        *lead, width_in, width_out = w_io.shape
        if math.prod(self.shape) > width_in * width_out:
            lead.pop()  # the experts, of which the shape tells
        return w_io.reshape(*lead, *self.shape)

    def fprop(self, a: Operand, dtype: Any, groups: Groups | None = None) -> jax.Array:
        assert self.fprop_operand is not None
        return multiply(a, self.fprop_operand, dtype, groups)

    def _gradient(self, dy: jax.Array | Operand) -> Operand:
        if isinstance(dy, Operand):
            return dy
        assert self.dgrad_operand is not None
        return quantise(dy.reshape(-1, self.dgrad_operand.q.shape[-1]), self.policy.dgrad[0])

    def dgrad(self, dy: jax.Array | Operand, dtype: Any, groups: Groups | None = None) -> jax.Array:
        assert self.dgrad_operand is not None
        return multiply(self._gradient(dy), self.dgrad_operand, dtype, groups)

    def dgrad_of_two(
        self, other: Self, dy: jax.Array, dy_other: jax.Array, dtype: Any, groups: Groups | None = None
    ) -> jax.Array:
        assert self.dgrad_operand is not None and other.dgrad_operand is not None
        pairs = ((self._gradient(dy), self.dgrad_operand), (other._gradient(dy_other), other.dgrad_operand))
        return sum_of_two(*pairs, dtype, groups)

    def along_tokens(self, a: Any, dy: Any = None, groups: Groups | None = None) -> Operand:
        """a in 128x1 tiles, along the tokens."""
        assert self.dgrad_operand is not None
        a = restore(a) if isinstance(a, Operand) else a.reshape(-1, self.dgrad_operand.q.shape[-2])
        return along_rows(a, self.policy.wgrad[0])

    def onto(self, gradient: "Quantised") -> "Quantised":
        """This weight, whose gradient adds to another."""
        return dataclasses.replace(self, master=gradient.master)

    def gradient_along_tokens(self, dy: Any) -> Operand:
        """dy in tiles along the tokens."""
        assert self.dgrad_operand is not None
        dy = dy if isinstance(dy, Operand) else dy.reshape(-1, self.dgrad_operand.q.shape[-1])
        return along_rows(dy, self.policy.wgrad[1])

    def dw(
        self, a: Operand, dy: Any, groups: Groups | None = None, onto: jax.Array | None = None
    ) -> jax.Array:
        """As `Plain.dw`; plus `onto`, a sum of gradients in the shape of the parameter."""
        return product_of_gradient(a, self.gradient_along_tokens(dy), groups, onto)

    def as_gradient(self, dw: jax.Array) -> "Quantised":
        """The master takes it all."""
        assert self.master is not None and self.master_shape is not None
        master = dw.reshape(self.master_shape).astype(self.master.dtype)
        return Quantised(master, None, None, self.policy, adds=self.adds)

    def wgrad(self, a: Any, dy: Any, groups: Groups | None = None) -> "Quantised":
        """Both operands are quantised along the tokens."""
        return self.wgrad_along(self.along_tokens(a), dy, groups)

    def wgrad_along(self, a: Operand, dy: Any, groups: Groups | None = None) -> "Quantised":
        return self.as_gradient(self.dw(a, dy, groups, self.master if self.adds else None))


def product_of_gradient(a: Operand, dy: Operand, groups: Groups | None, onto: jax.Array | None) -> jax.Array:
    """a^T dy of operands along the tokens, plus `onto`, a sum of gradients: float32 [in, out] or [e, in, out]."""
    if groups is None:
        return multiply(a, dy, jnp.float32, onto=None if onto is None else onto.reshape(len(a.q), len(dy.q)))
    return multiply_groups(a, dy, groups, onto)


def product(w: Any, n_in: int = 1) -> Any:
    """The product of a weight: its own, or that of an array whose first `n_in` dims are the input."""
    return w if hasattr(w, "fprop") else Plain(w, n_in)


def quantise_weight(
    w: jax.Array, policy: Policy, quantise: Callable[[jax.Array, Format], Operand] = quantise
) -> tuple[Operand, Operand]:
    """w [..., in, out] -> operands of fprop and dgrad. `quantise`: of a part of w, if that is what there is."""
    fprop, dgrad = policy.fprop[1], policy.dgrad[1]
    in_out = quantise(w, dgrad)
    same = fprop == dgrad and fprop.square
    return transpose(in_out if same else quantise(w, fprop.transposed)), in_out


def from_blocks(q: jax.Array, scale: jax.Array, shape: tuple[int, ...], policy: Policy) -> Quantised:
    """A weight of an FP8 checkpoint for inference, multiplied as it is: E4M3 [..., out, in], float32 scales of its
    128x128 blocks. `shape`: of the parameter, without layer dim; `policy` says how activations are quantised."""
    return Quantised(None, Operand(q, scale, policy.fprop[1]), None, policy, shape)

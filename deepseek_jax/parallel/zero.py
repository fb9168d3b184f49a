"""ZeRO-1: what a device keeps of each parameter between steps, and how it becomes what the forward pass reads.

Between steps the float32 master weights and the moments are divided over all axes that divide tokens: dense parameters
over data, node, local and tensor, experts, which the last three divide already, over data, and the attention's heads,
which tensor divides, over the other three. Once per step, for all its micro-batches, `gather` puts the compute copy
together and `scatter` sums the gradients to the devices that own them. What travels is what the forward pass reads:
master weights are cast before (`read_dtype`), and under an FP8 policy those of linear layers are quantised, each device
its part, with scales agreed on where a block lies on several.

The rule: of a matrix, the first dim that divides by the devices is divided, the layer dim included. Norm scales
stay whole everywhere; a matrix without such a dim is an error, not a copy that nobody asked for.

Legend: "axis" is of the mesh, "dim" of a tensor; w parameter, g gradient, all `tree` arguments alike in structure.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from deepseek_jax.model.params import Param, tree_map, tree_map_with_name
from deepseek_jax.model.weights import as_matrices, leading_dims
from deepseek_jax.parallel.mesh import TOKEN_AXES, Rules, param_spec, param_specs, spec_axes
from deepseek_jax.precision.operands import Format, Operand, quantise, quantise_part, transpose
from deepseek_jax.precision.policy import Policy
from deepseek_jax.precision.product import quantise_weight


@dataclasses.dataclass(frozen=True)
class Share:
    """How one parameter lies on a mesh.

    compute: spec while the forward pass reads it. axes: mesh axes, coarse to fine, that besides divide `dim` between
    steps; none: the forward pass reads the master as it lies. dtype: of the compute copy.
    """

    compute: PartitionSpec
    dim: int = 0
    axes: tuple[str, ...] = ()
    dtype: Any = jnp.float32

    @property
    def held(self) -> PartitionSpec:
        """Spec between steps: of the master weights, the moments and the summed gradient."""
        if not self.axes:
            return self.compute
        entries = [*self.compute, *[None] * (self.dim + 1 - len(self.compute))]
        entries[self.dim] = self.axes
        return PartitionSpec(*entries)


def read_dtype(param: Param, dtype: Any, quantised: bool) -> Any:
    """What the forward pass makes of a master weight where it uses it; cast to it before, nothing changes.

    Linear layers, embedding and head: the compute dtype. Gate and norms: float32. `quantised`: the weights of linear
    layers are quantised from float32, in which their gradients are.
    """
    if param.n_in is not None:
        return jnp.dtype(jnp.float32 if quantised else dtype)
    return jnp.dtype(dtype if "vocab" in param.axes else jnp.float32)


def _is_norm(param: Param) -> bool:
    return sum(axis != "layer" for axis in param.axes) < 2


def share_of(name: str, param: Param, mesh: Mesh | AbstractMesh, table: Rules, dtype: Any) -> Share:
    """The rule above for one parameter. Raises ValueError for a matrix of which no dim divides."""
    compute = param_spec(name, param, mesh, table)
    axes = tuple(a for a in TOKEN_AXES if mesh.shape[a] > 1 and a not in spec_axes(compute))
    if not axes or _is_norm(param):
        return Share(compute)
    parts = math.prod(mesh.shape[a] for a in axes)
    for dim, size in enumerate(param.shape):
        taken = dim < len(compute) and compute[dim]
        if not taken and size % parts == 0:
            return Share(compute, dim, axes, dtype)
    raise ValueError(
        f"{name} {param.shape}: no dim divides over the {parts} devices of "
        + " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
        + f"; change config.mesh.{axes[0]}, or set config.mesh.zero=False to keep it whole on each"
    )


def shares(
    tree: Any, mesh: Mesh | AbstractMesh, table: Rules, dtype: Any, quantised: bool, zero: bool
) -> Any:
    """`Share` of each `Param` of a tree; without `zero`, master weights lie as the forward pass reads them.

    dtype: the compute dtype; quantised: under an FP8 policy.
    """
    if not zero:
        return jax.tree.map(
            Share, param_specs(tree, mesh, table), is_leaf=lambda x: isinstance(x, PartitionSpec)
        )
    return tree_map_with_name(
        lambda name, p: share_of(name, p, mesh, table, read_dtype(p, dtype, quantised)), tree
    )


def held_specs(tree: Any) -> Any:
    """Spec between steps of each `Share`."""
    return jax.tree.map(lambda share: share.held, tree)


# --- inside shard_map -----------------------------------------------------------------------------------------


def gather(params: Any, tree: Any, declared: Any, policy: Policy | None) -> tuple[Any, Any]:
    """Master weights as held -> what the forward pass reads, for `model.weights.attach`.

    Returns (parameters, quantised operands as of `quantise_weights`). The parameters are cast and all-gathered; of a
    weight whose operands are there instead, which is only differentiated, they are zeros.
    """

    def parameter(p: Param, w: jax.Array, share: Share) -> jax.Array:
        if not share.axes:
            return w
        if policy is None or p.n_in is None:
            return _all_gathered(w.astype(share.dtype), share, share.dim)
        return jnp.zeros(_whole(w, share), share.dtype)

    def operands(p: Param, w: jax.Array, share: Share) -> Any:
        return None if policy is None or p.n_in is None else _quantised(p, w, share, policy)

    return tree_map(parameter, declared, params, tree), tree_map(operands, declared, params, tree)


def _all_gathered(x: jax.Array, share: Share, dim: int) -> jax.Array:
    return lax.all_gather(x, share.axes, axis=dim, tiled=True)


def _whole(w: jax.Array, share: Share) -> tuple[int, ...]:
    """Shape of what is gathered from parts like `w`."""
    parts = lax.axis_size(share.axes)
    return tuple(n * parts if dim == share.dim else n for dim, n in enumerate(w.shape))


def _quantised(p: Param, w: jax.Array, share: Share, policy: Policy) -> tuple[Operand, Operand]:
    """`quantise_weight` of a whole weight, bit for bit, from the part of it that is held: E4M3 and scales travel."""
    matrices = as_matrices(p, w)
    if not share.axes:
        return quantise_weight(matrices, policy)
    lead, whole = leading_dims(p), _whole(w, share)

    def bytes_gathered(q: jax.Array) -> jax.Array:
        values = lax.bitcast_convert_type(q.reshape(w.shape), jnp.uint8)
        return as_matrices(p, lax.bitcast_convert_type(_all_gathered(values, share, share.dim), q.dtype))

    def whole_matrices(x: jax.Array, fmt: Format) -> Operand:
        part = quantise(x, fmt)
        return Operand(bytes_gathered(part.q), _all_gathered(part.scale, share, share.dim), fmt)

    def divided_matrices(x: jax.Array, fmt: Format) -> Operand:
        assert p.n_in is not None
        by_input = share.dim - lead < p.n_in
        dims = slice(lead, lead + p.n_in) if by_input else slice(lead + p.n_in, None)
        rows = _own_part(whole[dims], share, share.dim - dims.start)
        largest = functools.partial(lax.pmax, axis_name=share.axes)
        if by_input:
            part = quantise_part(x, fmt, rows, math.prod(whole[dims]), largest)
        else:
            x = jnp.swapaxes(x, -1, -2)
            part = transpose(quantise_part(x, fmt.transposed, rows, math.prod(whole[dims]), largest))
        return Operand(bytes_gathered(part.q), part.scale, part.format)

    return quantise_weight(matrices, policy, whole_matrices if share.dim < lead else divided_matrices)


def _own_part(dims: tuple[int, ...], share: Share, dim: int) -> jax.Array:
    """Which elements this device holds of `dims` flattened, where `dim` is divided: int32."""
    index = jnp.arange(math.prod(dims), dtype=jnp.int32).reshape(dims)
    own = dims[dim] // lax.axis_size(share.axes)
    start = lax.axis_index(share.axes) * own
    return lax.dynamic_slice_in_dim(index, start, own, dim).reshape(-1)


def scatter(grads: Any, tree: Any) -> Any:
    """This device's gradients of the compute copy, float32 -> their sums as held.

    A parameter that the forward pass reads sharded has in its gradient the tokens of all devices that share it
    (they were dispatched, or gathered by the attention), so the sum leaves those axes out.
    """

    def one(g: jax.Array, share: Share) -> jax.Array:
        if share.axes:
            g = lax.psum_scatter(g, share.axes, scatter_dimension=share.dim, tiled=True)
        copies = tuple(a for a in TOKEN_AXES if a not in spec_axes(share.held) and lax.axis_size(a) > 1)
        return lax.psum(g, copies) if copies else g

    return jax.tree.map(one, grads, tree)

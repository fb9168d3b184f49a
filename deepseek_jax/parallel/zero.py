"""ZeRO-1: what a device keeps of each parameter between steps, and how it becomes what the forward pass reads.

Between steps the float32 master weights and the moments are divided over all axes of the mesh: dense parameters over
data, node, local and tensor, experts, which the last three divide already, over data, and the attention's heads, which
tensor divides, over the other three; all of them over pipe besides. Once per step, for all its micro-batches, `gather`
puts the compute copy together and `scatter` sums the gradients to the devices that own them. What travels is what the
forward pass reads: master weights are cast before (`read_dtype`), and under an FP8 policy those of linear layers are
quantised, each device its part, with scales agreed on where a block lies on several.

A rank of the pipeline reads the layers of its slots alone (`pipeline/slots.py`): they come from all ranks, each of which
keeps a part of every layer, so the state is divided evenly whatever the stages, and lies as it does without a pipeline.

The rule: of a matrix, the first dim that divides by the devices is divided, the layer dim included. With a pipeline the
layer dim is not, and where pipe and the other axes do not go into one dim together, pipe gets one of its own. Norm
scales stay whole everywhere; a matrix without such a dim is an error, not a copy that nobody asked for.

Legend: "axis" is of the mesh, "dim" of a tensor; w parameter, g gradient, all `tree` arguments alike in structure.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from deepseek_jax.model.params import Param, tree_map, tree_map_with_name
from deepseek_jax.model.weights import as_matrices, join, leading_dims
from deepseek_jax.parallel.mesh import PIPE, STATE_AXES, Rules, param_spec, param_specs, spec_axes
from deepseek_jax.parallel.pipeline.slots import fetch, place, select, send_back
from deepseek_jax.precision.operands import Format, Operand, quantise, quantise_part, transpose
from deepseek_jax.precision.policy import Policy
from deepseek_jax.precision.product import quantise_weight

Divided = tuple[tuple[int, tuple[str, ...]], ...]  # (dim, the mesh axes that divide it, coarse to fine)


@dataclasses.dataclass(frozen=True)
class Share:
    """How one parameter lies on a mesh.

    compute: spec while the forward pass reads it. divided: the dims that mesh axes besides divide between steps; none:
    the forward pass reads the master as it lies. dtype: of the compute copy.
    """

    compute: PartitionSpec
    divided: Divided = ()
    dtype: Any = jnp.float32

    @property
    def held(self) -> PartitionSpec:
        """Spec between steps: of the master weights, the moments and the summed gradient."""
        entries = [*self.compute, *[None] * (max((dim + 1 for dim, _ in self.divided), default=0))]
        for dim, axes in self.divided:
            entries[dim] = axes
        while entries and entries[-1] is None:
            entries.pop()
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
    axes = tuple(a for a in STATE_AXES if mesh.shape[a] > 1 and a not in spec_axes(compute))
    if not axes or _is_norm(param):
        return Share(compute)
    pipe, others = (tuple(a for a in axes if (a == PIPE) is which) for which in (True, False))
    dims = enumerate(itertools.zip_longest(param.axes, compute))
    free = [dim for dim, (logical, taken) in dims if not taken and not (pipe and logical == "layer")]
    together, apart = ((dim, dim) for dim in free), itertools.permutations(free, 2)
    for dim, of_pipe in itertools.chain(together, apart if pipe else ()):
        divided = ((dim, axes),) if dim == of_pipe else ((dim, others), (of_pipe, pipe))
        if all(param.shape[d] % math.prod(mesh.shape[a] for a in over) == 0 for d, over in divided):
            return Share(compute, tuple(part for part in divided if part[1]), dtype)
    raise ValueError(
        f"{name} {param.shape}: no dim divides over the {math.prod(mesh.shape[a] for a in axes)} devices of "
        + " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
        + (", nor two, one of them over pipe" if pipe and others else "")
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


Layers = Mapping[str, np.ndarray]  # name of a group of stacked parameters -> `Held.layers` of them


def _by_group(fn: Callable[..., Any], layers: Layers | None, like: Any, *trees: Any) -> Any:
    """`fn(table, ...)` of every parameter; table: which layers of its group the ranks hold, None where all hold all."""
    tables = layers or {}
    return {
        name: tree_map(functools.partial(fn, tables.get(name)), group, *(tree[name] for tree in trees))
        for name, group in like.items()
    }


def gather(
    params: Any, tree: Any, declared: Any, policy: Policy | None, dtype: Any, layers: Layers | None = None
) -> tuple[Any, Any]:
    """Master weights as held -> what the forward pass reads, for `model.weights.attach`.

    Returns (parameters, operands as of `quantise_weights` and `join`). The parameters are cast and all-gathered; of a
    weight whose operands are there instead, which is only differentiated, they are zeros.

    dtype: the compute dtype.
    layers: `Held.layers` of the pipeline. Groups of layers that it names come as this rank's slots [k, ...], with zeros
    in empty ones; all else, and everything without `layers`, comes whole.
    """

    def parameter(table: np.ndarray | None, p: Param, w: jax.Array, share: Share) -> jax.Array:
        if policy is not None and p.n_in is not None and share.divided:
            shape = _whole(w, share.divided)
            return jnp.zeros(shape if table is None else (table.shape[1], *shape[1:]), share.dtype)
        return _brought(w.astype(share.dtype), share.divided, table)

    def operands(table: np.ndarray | None, p: Param, w: jax.Array, share: Share) -> Any:
        return None if policy is None or p.n_in is None else _quantised(p, w, share.divided, policy, table)

    read, quantised = (_by_group(fn, layers, declared, params, tree) for fn in (parameter, operands))
    return join(read, quantised, declared, policy, dtype)


def _pipe_apart(divided: Divided, table: np.ndarray | None) -> tuple[int | None, Divided]:
    """The dim that pipe divides, if layers are exchanged over it, and the dims that are gathered."""
    if table is None:
        return None, divided
    assert all(dim > 0 for dim, _ in divided), "a part of the layers does not hold all slots' layers"
    of_pipe = [dim for dim, axes in divided if PIPE in axes]
    others = ((dim, tuple(a for a in axes if a != PIPE)) for dim, axes in divided)
    return (of_pipe[0] if of_pipe else None), tuple(part for part in others if part[1])


def _brought(x: jax.Array, divided: Divided, table: np.ndarray | None) -> jax.Array:
    """Parts of all layers -> whole, of the layers in this rank's slots if there is a table."""
    of_pipe, others = _pipe_apart(divided, table)
    if table is not None:
        x = select(x, table) if of_pipe is None else fetch(x, table, of_pipe)
    for dim, axes in others:
        x = lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def _whole(w: jax.Array, divided: Divided) -> tuple[int, ...]:
    """Shape of what is gathered from parts like `w`."""
    shape = list(w.shape)
    for dim, axes in divided:
        shape[dim] *= lax.axis_size(axes)
    return tuple(shape)


def _quantised(
    p: Param, w: jax.Array, divided: Divided, policy: Policy, table: np.ndarray | None
) -> tuple[Operand, Operand]:
    """`quantise_weight` of a whole weight, bit for bit, from the part of it that is held: E4M3 and scales travel."""
    assert p.n_in is not None
    lead, whole = leading_dims(p), _whole(w, divided)
    of_lead, of_matrix = (tuple(d for d in divided if (d[0] < lead) is which) for which in (True, False))
    sides = range(lead, lead + p.n_in), range(lead + p.n_in, w.ndim)
    largest = functools.partial(lax.pmax, axis_name=tuple(a for _, axes in of_matrix for a in axes))

    def part_of(x: jax.Array, fmt: Format) -> Operand:
        if not of_matrix:
            return quantise(x, fmt)
        n_in, n_out = (math.prod(whole[dim] for dim in side) for side in sides)
        rows, columns = (_own_part(whole, of_matrix, side) for side in sides)
        if rows is not None:
            return quantise_part(x, fmt, rows, columns, (n_in, n_out), largest)
        assert columns is not None
        x = jnp.swapaxes(x, -1, -2)
        return transpose(quantise_part(x, fmt.transposed, columns, None, (n_out, n_in), largest))

    def brought(x: jax.Array, fmt: Format) -> Operand:
        part = part_of(x, fmt)
        values = lax.bitcast_convert_type(part.q.reshape(w.shape), jnp.uint8)
        q = lax.bitcast_convert_type(_brought(values, divided, table), part.q.dtype)
        return Operand(as_matrices(p, q), _brought(part.scale, of_lead, table), part.format)

    return quantise_weight(as_matrices(p, w), policy, brought)


def _own_part(whole: tuple[int, ...], divided: Divided, side: range) -> jax.Array | None:
    """Which elements this device holds of the dims `side` flattened: int32; None: all."""
    dims = tuple(whole[dim] for dim in side)
    index = jnp.arange(math.prod(dims), dtype=jnp.int32).reshape(dims)
    here = [(side.index(dim), axes) for dim, axes in divided if dim in side]
    for dim, axes in here:
        own = dims[dim] // lax.axis_size(axes)
        index = lax.dynamic_slice_in_dim(index, lax.axis_index(axes) * own, own, dim)
    return index.reshape(-1) if here else None


def scatter(grads: Any, tree: Any, layers: Layers | None = None) -> Any:
    """This device's gradients of the compute copy, float32 -> their sums as held.

    A parameter that the forward pass reads sharded has in its gradient the tokens of all devices that share it
    (they were dispatched, or gathered by the attention), so the sum leaves those axes out. With `layers`, those of
    `gather`, the gradients of empty slots are dropped, and those of all copies of a layer summed.
    """

    def one(table: np.ndarray | None, g: jax.Array, share: Share) -> jax.Array:
        of_pipe, others = _pipe_apart(share.divided, table)
        for dim, axes in others:
            g = lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)
        if table is not None:
            g = place(g, table) if of_pipe is None else send_back(g, table, of_pipe)
        copies = tuple(a for a in STATE_AXES if a not in spec_axes(share.held) and lax.axis_size(a) > 1)
        return lax.psum(g, copies) if copies else g

    return _by_group(one, layers, grads, tree)

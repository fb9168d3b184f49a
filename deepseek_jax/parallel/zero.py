"""ZeRO-1: what a device keeps of each parameter between steps, and how it becomes what the forward pass reads.

Between steps the float32 master weights and the moments are divided over all axes that divide tokens: dense parameters
over data, node, local and tensor, experts, which the last three divide already, over data, and the attention's heads,
which tensor divides, over the other three. Once per step, for all its micro-batches, `gather` puts the compute copy
together and `scatter` sums the gradients to the devices that own them. Master weights are cast before they travel, to
what the forward pass reads: `read_dtype`.

The rule: of a matrix, the first dim that divides by the devices is divided, the layer dim included. Norm scales
stay whole everywhere; a matrix without such a dim is an error, not a copy that nobody asked for.

Legend: "axis" is of the mesh, "dim" of a tensor; w parameter, g gradient, all `tree` arguments alike in structure.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from deepseek_jax.model.params import Param, tree_map_with_name
from deepseek_jax.parallel.mesh import TOKEN_AXES, Rules, param_spec, param_specs, spec_axes


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
    layers are quantised from float32, after they are gathered, because blocks straddle the shards.
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


def gather(params: Any, tree: Any) -> Any:
    """Master weights as held -> what the forward pass reads: cast, then all-gathered."""

    def one(w: jax.Array, share: Share) -> jax.Array:
        if not share.axes:
            return w
        return lax.all_gather(w.astype(share.dtype), share.axes, axis=share.dim, tiled=True)

    return jax.tree.map(one, params, tree)


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

"""The order of collectives on CPU devices.

XLA for CPUs runs what does not depend on each other at the same time, and two collectives of one kind over the same
devices that run at the same time may take each other's parts: wrong numbers, or an abort ("Unexpected number of
participants"). Further rounds, which wait in a branch for nothing that the first one exchanges, are put in order by a
dependency that adds nothing. The two halves of `parallel/overlap.py` are not: that took four times as long to compile.
On GPUs a program's collectives have an order anyway, and nothing is added.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _arrays(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if x.size and x.dtype != jax.dtypes.float0]


def after(tree: Any, done: Any) -> Any:
    """`tree`, on CPUs only once all arrays of `done` are there."""
    leaves, structure = jax.tree.flatten(tree)

    def cpu(leaves: list[jax.Array], done: list[jax.Array]) -> list[jax.Array]:
        none = lax.optimization_barrier(jnp.int16(0))  # which no simplification sees through
        waited = jnp.int16(0)
        for x in done:
            waited += lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.int16) & none
        return [x + waited.astype(x.dtype) for x in leaves]

    there = [x for x in leaves if x.dtype != jax.dtypes.float0]
    of_each = [x.reshape(-1)[0] for x in _arrays(done)]  # so that nothing larger is kept for what waits
    ordered = iter(lax.platform_dependent(there, of_each, cpu=cpu, default=lambda leaves, done: leaves))
    return jax.tree.unflatten(
        structure, [x if x.dtype == jax.dtypes.float0 else next(ordered) for x in leaves]
    )

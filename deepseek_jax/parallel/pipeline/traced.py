"""Functions that are traced once, for all the programs that contain them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var, jaxpr_as_fun


def traced_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, for arguments of the same shapes in all calls; they are trees of arrays.

    What it does not read is not an argument of the program: of quantised weights, the masters, which are zeros as large as
    the weights in float32, exist nowhere.
    """
    found: list[tuple[list[bool], Callable[..., Any], Any]] = []

    def call(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        if not found:
            program, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
            reads = {v for e in program.jaxpr.eqns for v in e.invars if isinstance(v, Var)}
            reads |= {v for v in program.jaxpr.outvars if isinstance(v, Var)}
            read = [v in reads for v in program.jaxpr.invars]
            like = [(x.shape, x.dtype) for x in leaves]

            def run(*given: Any) -> list[Any]:
                rest = iter(given)
                every = [next(rest) if r else jnp.zeros(*of) for r, of in zip(read, like, strict=True)]
                return jaxpr_as_fun(program)(*every)

            found.append((read, jax.jit(run), jax.tree.structure(shapes)))
        read, run, tree = found[0]
        return jax.tree.unflatten(tree, run(*(x for r, x in zip(read, leaves, strict=True) if r)))

    return call

"""What stands in a traced program."""

import math
from collections.abc import Iterator
from typing import Any

import jax


def inner_programs(equation: Any) -> Iterator[Any]:
    """An equation's. Of an op's implementations, one per platform, that of this machine: the last."""
    params = equation.params
    values = [params["branches"][-1]] if params.get("branches_platforms") else params.values()
    for inner in jax.tree.leaves(list(values), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
            yield inner


def equations(jaxpr: Any) -> Iterator[Any]:
    """All of a program's, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_programs(equation):
            yield from equations(inner)


def flops(jaxpr):
    """Of the products of a program, those in a scan as often as it runs, in other loops and branches once."""
    total = 0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            depth = math.prod(e.invars[0].aval.shape[i] for i in contracted)
            total += 2 * e.outvars[0].aval.size * depth
        times = e.params["length"] if e.primitive.name == "scan" else 1
        total += times * sum(map(flops, inner_programs(e)))
    return total

"""A segment of a program: rows travel in two stages while work that needs none of them is done in two parts.

    messages are made ready
    ------------------------- barrier
    first stage of the trip | first part of the work
    ------------------------- barrier
    last stage of the trip  | second part of the work

The barriers keep each stage beside its part; running them at the same time is up to the scheduler (`compiler.py`).
Without the first, it does the work while messages are made ready, and nothing while they travel. Without the second, the
scheduler, which does not know how long a kernel of ours takes, places all work beside the first collective of the
segment. The backward pass is a segment too, written out: the trip back, last stage first, beside the gradients of the
parts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from deepseek_jax.model.layers import Params
from deepseek_jax.parallel.exchange.hops import Plan
from deepseek_jax.parallel.exchange.transport import COMBINE, DISPATCH, Direction


class Work(NamedTuple):
    """first(params, inputs) -> between; second(params, inputs, between) -> result. Pure functions."""

    first: Callable[[Params, Any], Any]
    second: Callable[[Params, Any, Any], Any]


def _barrier(*values: Any) -> Any:
    """Nothing that reads the results starts before all of `values` are there."""
    leaves, tree = jax.tree.flatten(values)
    real = [x for x in leaves if x.dtype != jax.dtypes.float0]  # the gradient of an integer is none
    done = iter(lax.optimization_barrier(real))
    return jax.tree.unflatten(tree, [x if x.dtype == jax.dtypes.float0 else next(done) for x in leaves])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def side_by_side(
    direction: Direction, work: Work, values: tuple[jax.Array, ...], plan: Plan, p: Params, inputs: Any
) -> tuple[Any, Any]:
    """(what the direction brings, the result of the work), differentiable in `values`, `p` and `inputs`.

    The plan is finished before the segment starts.
    """
    return _forward(direction, work, values, plan, p, inputs)[0]


def _in_stages(direction: Direction, values: tuple[jax.Array, ...], plan: Plan) -> tuple[Any, Any, Any]:
    """(messages made ready, functions of the first and of the last stage), under the direction's name."""

    def named(stage: Callable[[Any, Plan], Any]) -> Callable[[Any], Any]:
        def run(x: Any) -> Any:
            with jax.named_scope(direction.name):
                return stage(x, plan)

        return run

    load, start, finish = map(named, (direction.load, direction.start, direction.finish))
    return load(values), start, finish


def _forward(direction, work, values, plan, p, inputs):  # type: ignore[no-untyped-def]
    ready, start, finish = _in_stages(direction, values, plan)
    ready, _, inputs = _barrier(ready, plan, inputs)
    between, first_vjp = jax.vjp(work.first, p, inputs)
    on_the_way, between, inputs = _barrier(start(ready), between, inputs)
    result, second_vjp = jax.vjp(work.second, p, inputs, between)
    out = _barrier(finish(on_the_way), result)
    return out, (plan, first_vjp, second_vjp)


def _backward(direction, work, saved, g):  # type: ignore[no-untyped-def]
    plan, first_vjp, second_vjp = saved
    g_values, g_result = g
    back = COMBINE if direction is DISPATCH else DISPATCH
    ready, start, finish = _in_stages(back, direction.values(g_values), plan)
    ready, g_result = _barrier(ready, g_result)
    dp_second, d_inputs, d_between = second_vjp(g_result)
    on_the_way, dp_second, d_inputs, d_between = _barrier(start(ready), dp_second, d_inputs, d_between)
    dp_first, d_inputs_first = first_vjp(d_between)
    d_values, dp_first, d_inputs_first = _barrier(finish(on_the_way), dp_first, d_inputs_first)
    return back.values(d_values), None, _add(dp_first, dp_second), _add(d_inputs_first, d_inputs)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: x if x.dtype == jax.dtypes.float0 else x + y, a, b)


side_by_side.defvjp(_forward, _backward)

"""A segment of a program: rows travel in two stages while work that needs none of them is done in two parts.

    messages are made ready
    ------------------------- barrier
    first stage of the trip | first part of the work
    ------------------------- barrier
    last stage of the trip  | second part of the work

The barriers keep each stage beside its part; running them at the same time is up to the scheduler (`compiler.py`).
Without the first, it does the work while messages are made ready, and nothing while they travel. Without the second, the
scheduler, which does not know how long a kernel of ours takes, places all work beside the first collective of the
segment.

`segment` is that, whatever the work. `side_by_side` is differentiable: its backward pass is a segment too, the trip back,
last stage first, beside the gradients of the parts. A pipeline's pairs of a forward and a backward pass
(`pipeline/pair.py`) are made of segments in which the trip of one is beside the work of the other.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from deepseek_jax.model.layers import Params
from deepseek_jax.parallel.exchange import order
from deepseek_jax.parallel.exchange.hops import Plan
from deepseek_jax.parallel.exchange.transport import COMBINE, DISPATCH, Direction, Values


class Trip(NamedTuple):
    """What travels in a segment.

    after: None, or what the trip of the segment before brought; for work that may have further rounds of an exchange to
    do, which must not meet a trip on CPU devices (`exchange/order.py`). There the trip then waits for these arrays, each
    part of the work for the stage beside it, and what the trip brings for the work.
    """

    direction: Direction
    values: Any
    plan: Any
    after: Any = None

    @property
    def in_order(self) -> bool:
        return self.after is not None and self.plan.rounds is not None


def nothing(_: Any) -> tuple[()]:
    """Work that is none."""
    return ()


def segment(
    trip: Trip | None,
    first: Callable[[Any], Any] = nothing,
    second: Callable[[Any], Any] = nothing,
    inputs: Any = (),
) -> tuple[Any, Any]:
    """(what the trip brings, or () without one; the result of the work), both behind the closing barrier.

    first: inputs -> between. second: between -> result. What a part closes over does not wait for the opening barrier:
    what is computed just before the segment belongs to `inputs`. The plan is finished before the segment starts. Not
    differentiable as it stands: a gradient by JAX would lie beside nothing.
    """
    ready, start, finish = ((), nothing, nothing) if trip is None else _in_stages(trip)
    ready, _, inputs = _barrier(ready, () if trip is None else trip.plan, inputs)
    after = order.after if trip is not None and trip.in_order else lambda tree, done: tree
    on_the_way = start(ready)
    on_the_way, between = _barrier(on_the_way, first(after(inputs, on_the_way)))
    brought = finish(on_the_way)
    result = second(after(between, brought))
    return _barrier(after(brought, result), result)


def _barrier(*values: Any) -> Any:
    """Nothing that reads the results starts before all of `values` are there."""
    leaves, tree = jax.tree.flatten(values)
    real = [x for x in leaves if x.dtype != jax.dtypes.float0]  # the gradient of an integer is none
    done = iter(lax.optimization_barrier(real))
    return jax.tree.unflatten(tree, [x if x.dtype == jax.dtypes.float0 else next(done) for x in leaves])


def _in_stages(trip: Trip) -> tuple[Any, Any, Any]:
    """(messages made ready, functions of the first and of the last stage), under the direction's name."""

    def named(stage: Callable[[Any, Plan], Any]) -> Callable[[Any], Any]:
        def run(x: Any) -> Any:
            with jax.named_scope(trip.direction.name):
                return stage(x, trip.plan)

        return run

    load, start, finish = map(named, (trip.direction.load, trip.direction.start, trip.direction.finish))
    ready = load(trip.values)
    return order.after(ready, trip.after) if trip.in_order else ready, start, finish


# --- differentiable -----------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """first(params, inputs) -> between; second(params, inputs, between) -> result. Pure functions."""

    first: Callable[[Params, Any], Any]
    second: Callable[[Params, Any, Any], Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def side_by_side(
    direction: Direction, work: Work, values: Values, plan: Plan, p: Params, inputs: Any
) -> tuple[Any, Any]:
    """(what the direction brings, the result of the work), differentiable in `values`, `p` and `inputs`."""
    return _forward(direction, work, values, plan, p, inputs)[0]


def _forward(direction, work, values, plan, p, inputs):  # type: ignore[no-untyped-def]
    vjps = []  # which hold the parameters, and so pass no barrier

    def first(inputs: Any) -> Any:
        between, vjp = jax.vjp(work.first, p, inputs)
        vjps.append(vjp)
        return inputs, between

    def second(between: Any) -> Any:
        result, vjp = jax.vjp(work.second, p, *between)
        vjps.append(vjp)
        return result

    out = segment(Trip(direction, values, plan), first, second, inputs)
    return out, (plan, *vjps)


def _backward(direction, work, saved, g):  # type: ignore[no-untyped-def]
    plan, first_vjp, second_vjp = saved
    g_values, g_result = g
    back = COMBINE if direction is DISPATCH else DISPATCH

    of_second = []  # added up behind the segment: sums in it hold up what travels

    def first_part(gradients: Any) -> Any:
        *of_p_and_inputs, d_between = gradients
        of_second.extend(of_p_and_inputs)
        return first_vjp(d_between)

    trip = Trip(back, direction.values(g_values), plan)
    brought, of_first = segment(trip, second_vjp, first_part, g_result)
    return back.values(brought), None, *map(_add, of_first, of_second)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: x if x.dtype == jax.dtypes.float0 else x + y, a, b)


side_by_side.defvjp(_forward, _backward)

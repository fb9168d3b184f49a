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
from deepseek_jax.parallel import exchange
from deepseek_jax.parallel.exchange import Exchange, Plan, from_experts, homewards, outwards, to_experts


class Work(NamedTuple):
    """first(params, inputs) -> between; second(params, inputs, between) -> result. Pure functions."""

    first: Callable[[Params, Any], Any]
    second: Callable[[Params, Any, Any], Any]


class Route(NamedTuple):
    """A kind of exchange: the functions of `exchange.py` that bring values there and their gradients back."""

    name: str
    there: Callable[..., exchange.Trip]
    back: Callable[..., exchange.Trip]
    ex: Exchange
    rows: int | None

    def prepare(self, values: tuple[jax.Array, ...], plan: Plan) -> exchange.Trip:
        """All of its work is done under the route's name."""
        with jax.named_scope(self.name):
            trip = self.there(values, plan, self.ex, self.rows)
        return exchange.Trip(trip.ready, self._named(trip.first), self._named(trip.last))

    def _named(self, stage: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def named(x):  # type: ignore[no-untyped-def]
            with jax.named_scope(self.name):
                return stage(x)

        return named

    def reversed(self) -> "Route":
        return self._replace(there=self.back, back=self.there)


def dispatching(ex: Exchange, rows: int | None) -> Route:
    """Values (x [n, d], weights [n, k]) -> `exchange.Received`."""
    return Route("dispatch", to_experts, from_experts, ex, rows)


def combining(ex: Exchange, rows: int | None) -> Route:
    """Values (y [r, d],) -> (sums [n, d],)."""
    return Route("combine", homewards, outwards, ex, rows)


def _together(*values: Any) -> Any:
    """Nothing that reads the results starts before all of `values` are there."""
    leaves, tree = jax.tree.flatten(values)
    real = [x for x in leaves if x.dtype != jax.dtypes.float0]  # the gradient of an integer is none
    done = iter(lax.optimization_barrier(real))
    return jax.tree.unflatten(tree, [x if x.dtype == jax.dtypes.float0 else next(done) for x in leaves])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def side_by_side(
    route: Route, work: Work, values: tuple[jax.Array, ...], plan: Plan, p: Params, inputs: Any
) -> tuple[Any, Any]:
    """(what the trip brings, the result of the work), differentiable in `values`, `p` and `inputs`.

    The plan is finished before the segment starts.
    """
    return _forward(route, work, values, plan, p, inputs)[0]


def _forward(route, work, values, plan, p, inputs):  # type: ignore[no-untyped-def]
    trip = route.prepare(values, plan)
    ready, _, inputs = _together(trip.ready, plan, inputs)
    between, first_vjp = jax.vjp(work.first, p, inputs)
    on_the_way, between, inputs = _together(trip.first(ready), between, inputs)
    result, second_vjp = jax.vjp(work.second, p, inputs, between)
    out = _together(trip.last(on_the_way), result)
    return out, (plan, first_vjp, second_vjp)


def _backward(route, work, saved, g):  # type: ignore[no-untyped-def]
    plan, first_vjp, second_vjp = saved
    g_values, g_result = g
    trip = route.reversed().prepare(g_values, plan)
    ready, g_result = _together(trip.ready, g_result)
    dp_second, d_inputs, d_between = second_vjp(g_result)
    on_the_way, dp_second, d_inputs, d_between = _together(trip.first(ready), dp_second, d_inputs, d_between)
    dp_first, d_inputs_first = first_vjp(d_between)
    d_values, dp_first, d_inputs_first = _together(trip.last(on_the_way), dp_first, d_inputs_first)
    return d_values, None, _add(dp_first, dp_second), _add(d_inputs_first, d_inputs)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: x if x.dtype == jax.dtypes.float0 else x + y, a, b)


side_by_side.defvjp(_forward, _backward)

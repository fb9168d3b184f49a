"""Dispatch and combine of tokens over a mesh: dropless, ragged, planned once per routing (report section 3.2.2).

Everything here runs inside `shard_map` (check_vma=False). With two hops, a token crosses to each node that it needs
once, over `node`, to the device with its own index in the node, and is forwarded inside the node. Partial sums take the
way back: summed inside the node first, then they cross once.

Dispatch and combine are each other's transpose: the backward pass of one is the other, with the same plan and in the
other's format. Each is made of three pieces, so that a caller can place work beside the collectives
(`side_by_side.py`):

    |          | load                        | start                         | finish                  |
    | -------- | --------------------------- | ----------------------------- | ----------------------- |
    | dispatch | encode, copy rows for peers | between nodes, copy for peers | inside the node, decode |
    | combine  | encode                      | inside the node, sum, encode  | between nodes, sum      |

With one hop, all of a dispatch's travel is in `finish`, all of a combine's in `start`.

Dims: n token of this device, d hidden, k selected expert, r row received.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.dispatch import Received
from deepseek_jax.parallel.exchange.hops import Plan, for_peers, send, send_back, sums
from deepseek_jax.parallel.exchange.wire import Message, read, write

Values = tuple[jax.Array, ...]


def _written(values: Values, plan: Plan) -> Message:
    """Tokens, or their gradients alone; with their routing weights, expert ids travel too."""
    ids = () if len(values) == 1 or plan.experts_nk is None else (plan.experts_nk,)
    return write((*values, *ids), plan.wire.dispatch)


def at_last_hop(values: Values, plan: Plan) -> Message:
    """A dispatch whose last hop is to come: rows at the source of that hop."""
    message = _written(values, plan)
    for hop in plan.hops[:-1]:
        message = send(for_peers(message, hop), hop)
    return message


def _dispatch_load(values: Values, plan: Plan) -> Message:
    return for_peers(_written(values, plan), plan.hops[0])


def _dispatch_start(message: Message, plan: Plan) -> Message:
    for hop, onward in zip(plan.hops[:-1], plan.hops[1:], strict=True):
        message = for_peers(send(message, hop), onward)
    return message


def _dispatch_finish(message: Message, plan: Plan) -> Received:
    (x_rd, *beside), sent = read(send(message, plan.hops[-1]))
    weights_rk, ids_rk = (*beside, None, None)[:2]
    if ids_rk is not None:
        ids_rk = ids_rk - plan.rank * plan.n_local
        here = plan.hops[-1].live_r[:, None] & (ids_rk >= 0) & (ids_rk < plan.n_local)
        ids_rk = jnp.where(here, ids_rk, -1)
    return Received(x_rd, weights_rk, ids_rk, sent)


def _combine_load(values: Values, plan: Plan) -> Message:
    return write(values, plan.wire.combine)


def _combine_start(message: Message, plan: Plan) -> Message | Values:
    values = sums(send_back(message, plan.hops[-1]), plan.hops[-1])
    return values if len(plan.hops) == 1 else write(values, plan.wire.combine)


def _combine_finish(there: Any, plan: Plan) -> Values:
    return there if len(plan.hops) == 1 else sums(send_back(there, plan.hops[0]), plan.hops[0])


def from_last_hop(values: Values, plan: Plan) -> Values:
    """A combine whose last hop is done."""
    return values if len(plan.hops) == 1 else _combine_finish(write(values, plan.wire.combine), plan)


class Direction(NamedTuple):
    """`finish(start(load(values, plan), plan), plan)`; `values` are the differentiable arrays of what it brings, if it has a
    gradient."""

    name: str
    load: Callable[[Any, Any], Any]
    start: Callable[[Any, Any], Any]
    finish: Callable[[Any, Any], Any]
    values: Callable[[Any], Values] = lambda brought: brought

    def __call__(self, values: Any, plan: Any) -> Any:
        with jax.named_scope(self.name):
            return self.finish(self.start(self.load(values, plan), plan), plan)


DISPATCH = Direction(
    "dispatch",
    _dispatch_load,
    _dispatch_start,
    _dispatch_finish,
    lambda came: (came.x_rd,) if came.weights_rk is None else (came.x_rd, came.weights_rk),
)
COMBINE = Direction("combine", _combine_load, _combine_start, _combine_finish)


@jax.custom_vjp
def dispatch(x_nd: jax.Array, weights_nk: jax.Array, plan: Plan) -> Received:
    """Tokens and their routing weights (float32) to the devices of their experts, each row once per device.

    Formats: `plan.wire.dispatch` forwards, `plan.wire.combine` for the gradient.
    """
    return DISPATCH((x_nd, weights_nk), plan)


dispatch.defvjp(
    lambda x_nd, weights_nk, plan: (dispatch(x_nd, weights_nk, plan), plan),
    lambda plan, g: (*COMBINE(DISPATCH.values(g), plan), None),
)


@jax.custom_vjp
def combine(y_rd: jax.Array, plan: Plan) -> jax.Array:
    """Results of the rows received -> their plain sums [n, d] at the tokens' sources, summed in float32 per hop.

    Formats: `plan.wire.combine` forwards, `plan.wire.dispatch` for the gradient.
    """
    return COMBINE((y_rd,), plan)[0]


combine.defvjp(
    lambda y_rd, plan: (combine(y_rd, plan), plan),
    lambda plan, g_nd: (DISPATCH((g_nd,), plan).x_rd, None),
)

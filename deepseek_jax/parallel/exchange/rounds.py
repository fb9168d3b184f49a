"""One device's experts on what a dispatch brings, and the further rounds of it, if there are any.

Each round brings a part of the rows of the last hop (`hops.py: Rounds`), runs the experts on it and adds the results
to the rows at the source of the last hop. The first round is an ordinary dispatch and combine; if it is enough, as with
balanced routing, the others are skipped, in both passes. The backward pass of further rounds brings the rows again
instead of keeping them. It adds its gradients of the parameters to those of the first round, so that nothing of the
weights' size is made where there are no further rounds. A pipeline computes weight gradients later than the others: `apart`,
those of further rounds have a branch of their own, which brings the rows once more.

On GPUs, XLA has the host wait for a branch: once in each pass of a layer, 10 to 20 us of milliseconds. Rounds of a known number
would have to be as many as the worst routing needs (32 where a balanced one needs 1, for DeepSeek-V3 on 8 nodes of 8 at 8 pairs per token).

Dims: n token of this device, m row at the source of the last hop, r row received, d hidden, k selected expert, e expert
of this device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.dispatch import Received
from deepseek_jax.model.layers import Params
from deepseek_jax.model.weights import gradients_onto, sums_of_gradients
from deepseek_jax.parallel.exchange.hops import Plan, for_peers, send_back, sums
from deepseek_jax.parallel.exchange.order import after
from deepseek_jax.parallel.exchange.transport import COMBINE, DISPATCH, Values, at_last_hop, from_last_hop

Function = Callable[..., jax.Array]


def on_rows(function: Function, p: Params, came: Received, plan: Plan) -> jax.Array:
    """Results [r, d] of this device's experts; a row meets no more of them than there are."""
    ids_rk, weights_rk = came.experts_rk, came.weights_rk
    if plan.n_local < ids_rk.shape[1]:
        _, column = lax.top_k((ids_rk >= 0).astype(jnp.int32), plan.n_local)
        ids_rk, weights_rk = (jnp.take_along_axis(x, column, axis=1) for x in (ids_rk, weights_rk))
    form = plan.wire.dispatch
    return function(p, came.x_rd, ids_rk, weights_rk, sent=came.sent, form=form, pairs=plan.pairs)


def _differentiated(function: Function, p: Params, came: Received, plan: Plan) -> Any:
    """(results of the rows, function from their gradient to that of parameters, rows and weights)"""

    def results(p: Params, x_rd: jax.Array, weights_rk: jax.Array) -> jax.Array:
        return on_rows(function, p, came._replace(x_rd=x_rd, weights_rk=weights_rk), plan)

    return jax.vjp(results, p, came.x_rd, came.weights_rk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_rounds(
    function: Function,
    apart: bool,
    p: Params,
    came: Received,
    x_nd: jax.Array,
    weights_nk: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """(y [r, d] of the first round, whose combine is to come; what further rounds add to the tokens [n, d]).

    apart: the gradients of x, rows and weights need nothing that those of the parameters need alone.
    """
    return _in_rounds_fwd(function, apart, p, came, x_nd, weights_nk, plan)[0]


def _in_rounds_fwd(function, apart, p, came, x_nd, weights_nk, plan):  # type: ignore[no-untyped-def]
    y_rd, vjp = _differentiated(function, p, came, plan)
    with jax.named_scope("rounds"):
        more_nd = lax.cond(
            after(plan.rounds.needed, (y_rd, plan.hops)) > 1,
            lambda: _further(function, p, x_nd, weights_nk, plan),
            lambda: jnp.zeros_like(x_nd),
        )
    return (after(y_rd, more_nd), more_nd), (vjp, p, x_nd, weights_nk, plan)


def _in_rounds_bwd(function, apart, saved, g):  # type: ignore[no-untyped-def]
    vjp, p, x_nd, weights_nk, plan = saved
    g_rd, g_nd = g
    dp, dx_rd, dweights_rk = vjp(g_rd)

    def further(done, dp, like):  # type: ignore[no-untyped-def]
        return lax.cond(
            after(plan.rounds.needed, done) > 1,
            lambda dp: _further_gradients(function, p, x_nd, weights_nk, plan, g_nd, dp, like),
            lambda dp: (dp, *map(jnp.zeros_like, like)),
            dp,
        )

    like = (x_nd, weights_nk)
    with jax.named_scope("rounds"):
        first, dx_nd, dweights_nk = further((dx_rd, g_nd), None if apart else dp, like)
        dp = further(dx_nd, dp, ())[0] if apart else first
    return dp, Received(after(dx_rd, dx_nd), dweights_rk), dx_nd, dweights_nk, None


in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)


def _brought(message, plan):  # type: ignore[no-untyped-def]
    """The last hop of a dispatch."""
    return DISPATCH.finish(for_peers(message, plan.hops[-1]), plan)


def _added(sums_m: Values, values: Values, plan: Plan) -> Values:
    """The last hop of a combine, added to sums [m, ...], which are float32."""
    hop, message = plan.hops[-1], COMBINE.load(values, plan)
    return tuple(map(jnp.add, sums_m, sums(send_back(message, hop), hop, jnp.float32)))


def _nothing(like: Values, plan: Plan) -> Values:
    m = len(plan.rounds.pairs_mp)  # type: ignore[union-attr]
    return tuple(jnp.zeros((m, x.shape[1]), jnp.float32) for x in like)


def _finished(sums_m: Values, like: Values, plan: Plan) -> Values:
    return from_last_hop(tuple(s.astype(x.dtype) for s, x in zip(sums_m, like, strict=True)), plan)


def _further(function, p, x_nd, weights_nk, plan):  # type: ignore[no-untyped-def]
    """Dispatch, experts and combine of all rounds but the first -> sums [n, d]."""
    message = at_last_hop((x_nd, weights_nk), plan)

    def one(i, sums_m):
        here = plan.at_round(i)
        y_rd = on_rows(function, p, _brought(message, here), here)
        return _added(sums_m, (y_rd,), here)

    sums_m = lax.fori_loop(1, plan.rounds.needed, one, _nothing((x_nd,), plan))
    return _finished(sums_m, (x_nd,), plan)[0]


def _further_gradients(function, p, x_nd, weights_nk, plan, g_nd, dp, like):  # type: ignore[no-untyped-def]
    """Gradients of `_further`: those of the parameters added to `dp`, in float32, unless that is None, and those of
    `like`, which is (x, weights) or (). Dispatches again."""
    message, g_message = at_last_hop((x_nd, weights_nk), plan), at_last_hop((g_nd,), plan)

    def one(i, carry):
        dp, sums_m = carry
        here = plan.at_round(i)
        onto = p if dp is None else gradients_onto(p, dp)
        _, vjp = _differentiated(function, onto, _brought(message, here), here)
        dp_here, *back = vjp(_brought(g_message, here).x_rd)
        if dp is not None:
            dp = sums_of_gradients(p, dp, dp_here)
        return dp, _added(sums_m, tuple(back), here) if like else ()

    wide = jax.tree.map(lambda d: d.astype(jnp.float32), dp)
    wide, sums_m = lax.fori_loop(1, plan.rounds.needed, one, (wide, _nothing(like, plan)))
    dp = jax.tree.map(lambda wide, d: wide.astype(d.dtype), wide, dp)
    return dp, *(_finished(sums_m, like, plan) if like else ())

"""Bounded buffers for an expert exchange: what one buffer cannot hold comes in further rounds, nothing is dropped.

The last hop of a dispatch brings a window of its rows at a time, as often as the device with the most rows needs.

Dims: as in `experts.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.layers import Params
from deepseek_jax.model.moe import Experts
from deepseek_jax.parallel.exchange import (
    Exchange,
    Plan,
    Received,
    Window,
    arrive,
    as_received,
    decoded,
    depart,
    forwarded,
    inbound,
    loaded,
)
from deepseek_jax.parallel.wire import Layout


def _rounds(plan: Plan, rows: int) -> jax.Array:
    """As many as the device with the most rows needs."""
    return (plan.most_rows + rows - 1) // rows


def _window_ids(plan: Plan, window: Window) -> jax.Array:
    ids_rk = jnp.pad(plan.experts_rk, ((0, window.rows), (0, 0)), constant_values=-1)
    return lax.dynamic_slice_in_dim(ids_rk, window.first, window.rows)


def _outbound(
    x_nd: jax.Array, extra: tuple[jax.Array, ...], form: str, plan: Plan, ex: Exchange
) -> tuple[jax.Array, Layout]:
    """All of a dispatch but its last collective -> messages [s, w] to be sent by it, and their layout."""
    message, layout = loaded(x_nd, extra, form, plan)
    return forwarded(message, plan, ex), layout


class Way(NamedTuple):
    """What is static about rounds: the exchange, one device's experts, and how many rows a round receives."""

    ex: Exchange
    local: Experts
    rows: int


def _run_rounds(
    p: Params, x_nd: jax.Array, weights_nk: jax.Array, plan: Plan, way: Way, first: int
) -> jax.Array:
    """Dispatch, the experts and combine in windows of the rows received, from round `first` on."""
    ex, local, rows = way
    form, count = ex.wire.dispatch, _rounds(plan, rows)
    message, layout = _outbound(x_nd, (weights_nk,), form, plan, ex)

    def one(i, y_sd):
        window = Window(i * rows, rows)
        came = as_received(arrive(message, plan, ex, window), layout, form, x_nd.dtype)
        y_rd = local(p, came.tokens(p, ex), _window_ids(plan, window), came.weights_rk)
        return y_sd + depart((y_rd,), plan, ex, window)[0]

    y_sd = jnp.zeros((message.shape[0], x_nd.shape[1]), x_nd.dtype)
    y_sd = lax.fori_loop(first, count, one, y_sd)
    return inbound((y_sd,), plan, ex)[0]


def _differentiate_rounds(p, x_nd, weights_nk, plan, g_nd, dp, way, first):  # type: ignore[no-untyped-def]
    """Gradients of `_run_rounds`; those of the parameters are added to `dp`, in float32. Dispatches again."""
    ex, _, rows = way
    form, count = ex.wire.dispatch, _rounds(plan, rows)
    message, layout = _outbound(x_nd, (weights_nk,), form, plan, ex)
    g_message, g_layout = _outbound(g_nd, (), form, plan, ex)

    def one(i, carry):
        dp, back_s = carry
        window = Window(i * rows, rows)
        came = as_received(arrive(message, plan, ex, window), layout, form, x_nd.dtype)
        (g_rd,) = decoded(arrive(g_message, plan, ex, window), g_layout, form, g_nd.dtype, 0)
        ids_rk = _window_ids(plan, window)
        _, vjp = _differentiated(way, p, came, ids_rk)
        dp_here, dx_rd, dweights_rk = vjp(g_rd)
        back_s = jax.tree.map(jnp.add, back_s, depart((dx_rd, dweights_rk), plan, ex, window))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), dp, dp_here), back_s

    s = message.shape[0]
    dp = jax.tree.map(lambda d: d.astype(jnp.float32), dp)
    back_s = tuple(jnp.zeros((s, a.shape[1]), a.dtype) for a in (x_nd, weights_nk))
    dp, back_s = lax.fori_loop(first, count, one, (dp, back_s))
    dx_nd, dweights_nk = inbound(back_s, plan, ex)
    return jax.tree.map(lambda d, w: d.astype(w.dtype), dp, p), dx_nd, dweights_nk


def _differentiated(way: Way, p: Params, came: Received, ids_rk: jax.Array) -> Any:
    """(results of the rows, function from their gradient to that of parameters, rows and weights)"""

    def results(p, x_rd, weights_rk):  # type: ignore[no-untyped-def]
        return way.local(p, came._replace(x_rd=x_rd).tokens(p, way.ex), ids_rk, weights_rk)

    return jax.vjp(results, p, came.x_rd, came.weights_rk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def in_rounds(p: Params, x_nd: jax.Array, weights_nk: jax.Array, plan: Plan, way: Way) -> jax.Array:
    """All rounds; the backward pass dispatches again instead of keeping what came."""
    return _run_rounds(p, x_nd, weights_nk, plan, way, 0)


def _in_rounds_fwd(p, x_nd, weights_nk, plan, way):  # type: ignore[no-untyped-def]
    return in_rounds(p, x_nd, weights_nk, plan, way), (p, x_nd, weights_nk, plan)


def _in_rounds_bwd(way, saved, g_nd):  # type: ignore[no-untyped-def]
    p, x_nd, weights_nk, plan = saved
    dp = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), p)
    return *_differentiate_rounds(p, x_nd, weights_nk, plan, g_nd, dp, way, 0), None


in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def received(
    p: Params, came: Received, x_nd: jax.Array, weights_nk: jax.Array, plan: Plan, way: Way
) -> tuple[jax.Array, jax.Array]:
    """(y [r, d] of the first buffer, whose combine is to come; what further rounds add to the tokens [n, d]).

    Rounds that there are not cost nothing, in the backward pass too: the parameters' gradients pass through.
    """
    return _received_fwd(p, came, x_nd, weights_nk, plan, way)[0]


def _received_fwd(p, came, x_nd, weights_nk, plan, way):  # type: ignore[no-untyped-def]
    ids_rk = plan.experts_rk[: way.rows]
    y_rd, vjp = _differentiated(way, p, came, ids_rk)
    with jax.named_scope("rounds"):
        more_nd = lax.cond(
            _rounds(plan, way.rows) > 1,
            lambda: _run_rounds(p, x_nd, weights_nk, plan, way, 1),
            lambda: jnp.zeros_like(x_nd),
        )
    return (y_rd, more_nd), (vjp, p, x_nd, weights_nk, plan)


def _received_bwd(way, saved, g):  # type: ignore[no-untyped-def]
    vjp, p, x_nd, weights_nk, plan = saved
    g_rd, g_nd = g
    dp, dx_rd, dweights_rk = vjp(g_rd)
    with jax.named_scope("rounds"):
        dp, dx_nd, dweights_nk = lax.cond(
            _rounds(plan, way.rows) > 1,
            lambda dp: _differentiate_rounds(p, x_nd, weights_nk, plan, g_nd, dp, way, 1),
            lambda dp: (dp, jnp.zeros_like(x_nd), jnp.zeros_like(weights_nk)),
            dp,
        )
    return dp, Received(dx_rd, dweights_rk), dx_nd, dweights_nk, None


received.defvjp(_received_fwd, _received_bwd)

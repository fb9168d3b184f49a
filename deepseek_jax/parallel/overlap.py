"""Two micro-batches in flight: one attends or computes while the other's tokens travel (report sections 3.2.1, 3.4).

The local batch is divided into two halves, a and b. The phases of a MoE block (`model/block.py`) run in four segments
per layer, with half b half a layer behind. Each segment has two stages (`side_by_side.py`), after the two hops of an
exchange; the hop between nodes, the slower one, is beside the larger part of the work:

    1  attention of a   | combine of b, from the layer before: inside nodes, between nodes
    2  attention of b   | dispatch of a: between nodes, inside nodes
    3  experts of a     | dispatch of b: between nodes beside routed experts, inside nodes beside shared ones
    4  experts of b     | combine of a: inside nodes beside shared experts, between nodes beside routed ones

The backward pass is the same four segments from the last to the first. Nothing hides the plans, which are a few small
collectives before segments 2 and 3, and the combine of b after the last layer. Of the rest, the scheduler places the
starts: `python -m experiments.plan overlap` says which of them it places around GEMMs.

Results are those of the whole batch. Balance statistics are taken over both halves together.

Dims: b sequence, t token, d hidden, n = b * t token, r row received, k selected expert, e expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import attention_in, attention_out, unroll
from deepseek_jax.model.layers import Params
from deepseek_jax.model.layout import Context
from deepseek_jax.model.moe import AtExperts, Routed, experts, gate, shared
from deepseek_jax.model.recompute import recompute
from deepseek_jax.model.router import BalanceStats, balance_stats
from deepseek_jax.parallel.exchange.dispatcher import fitting
from deepseek_jax.parallel.exchange.hops import Plan
from deepseek_jax.parallel.exchange.transport import COMBINE, DISPATCH
from deepseek_jax.parallel.side_by_side import Work, side_by_side

HALVES = 2


def halves(tree: Any) -> tuple[Any, Any]:
    """Arrays [b, ...] -> their two halves along b. Raises ValueError for an odd b."""
    for x in jax.tree.leaves(tree):
        if len(x) % HALVES:
            raise ValueError(
                f"a local batch of {len(x)} sequences does not divide into {HALVES} micro-batches: give each device "
                "an even number by train.batch_size, train.grad_accumulation or mesh.*, or set "
                "config.mesh.overlap=False"
            )
    first, second = (jax.tree.map(lambda x, i=i: jnp.split(x, HALVES)[i], tree) for i in range(HALVES))
    return first, second


def joined(a: Any, b: Any) -> Any:
    """The inverse of `halves`."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _contexts(ctx: Context) -> tuple[Context, Context]:
    """What the layers of each half share; positions that all sequences have in common stay as they are."""
    ropes = halves(ctx.rope) if len(ctx.rope[0]) > 1 else (ctx.rope, ctx.rope)
    rest = halves((ctx.segments_bt, ctx.counted_bt))
    first, second = (
        ctx._replace(rope=rope, segments_bt=segments, counted_bt=counted, routes=None)
        for rope, (segments, counted) in zip(ropes, rest, strict=True)
    )
    return first, second


# --- work ---------------------------------------------------------------------------------------------------------


def attention(cfg: ModelConfig, ctx: Context) -> Work:
    """Inputs (x [b, t, d], rope, segments) -> x plus its attention; in between, what the core reads."""

    def first(p: Params, inputs: Any) -> Any:
        x_btd, rope, segments_bt = inputs
        return attention_in(p, cfg, x_btd, ctx._replace(rope=rope, segments_bt=segments_bt))

    def second(p: Params, inputs: Any, read: Any) -> jax.Array:
        x_btd, rope, segments_bt = inputs
        here = ctx._replace(rope=rope, segments_bt=segments_bt)
        return attention_out(p, cfg, x_btd, read, here)

    return Work(first, second)


NOTHING = Work(lambda p, inputs: (), lambda p, inputs, between: ())


class Done(NamedTuple):
    """A half before its combine: `x_btd` lacks only what `y_rd`, the results of the first round, adds."""

    x_btd: jax.Array
    y_rd: jax.Array
    plan: Plan


def expert_work(cfg: ModelConfig, ctx: Context, shared_first: bool) -> Work:
    """Inputs `AtExperts` -> (x [b, t, d], y [r, d]) of `Done`."""

    def result(x_btd: jax.Array, y: Any) -> tuple[jax.Array, jax.Array]:
        return x_btd if y.more_nd is None else x_btd + y.more_nd.reshape(x_btd.shape), y.y_rd

    if shared_first:
        return Work(
            lambda p, at: shared(p, cfg, at, ctx), lambda p, at, x_btd: result(x_btd, experts(p, at, ctx))
        )
    return Work(lambda p, at: experts(p, at, ctx), lambda p, at, y: result(shared(p, cfg, at, ctx), y))


# --- one layer ----------------------------------------------------------------------------------------------------


def _dispatched(p: Params, to: Routed, x_btd: jax.Array, work: Work, inputs: Any) -> tuple[AtExperts, Any]:
    """Dispatch of one half beside `work` of the other."""
    received, result = side_by_side(DISPATCH, work, to.values, to.plan, p, inputs)
    return AtExperts(x_btd, to.h_btd, to.values[1], to.plan, received), result


def _combined(p: Params, done: Done, work: Work, inputs: Any) -> tuple[jax.Array, Any]:
    """Combine of one half beside `work` of the other -> (x [b, t, d] after its layer, result of the work)."""
    (y_nd,), result = side_by_side(COMBINE, work, (done.y_rd,), done.plan, p, inputs)
    return done.x_btd + fitting(y_nd, done.plan).reshape(done.x_btd.shape), result


def layer(
    p: Params,
    cfg: ModelConfig,
    x_a: jax.Array,
    done_b: Done,
    bias_e: jax.Array | None,
    contexts: tuple[Context, Context],
) -> tuple[tuple[jax.Array, Done], BalanceStats]:
    """One block for both halves; half b comes from the layer before, and leaves, with its combine to be done."""
    (ctx_a, ctx_b), (rest_a, rest_b) = contexts, ((c.rope, c.segments_bt) for c in contexts)
    attend = attention(cfg, ctx_a)
    routed_first, shared_first = (expert_work(cfg, ctx_a, first) for first in (False, True))
    attn, ffn = ({name: p[name] for name in (f"{part}_norm_d", part)} for part in ("attn", "ffn"))
    x_b, x_a = _combined(attn, done_b, attend, (x_a, *rest_a))
    to_a = gate(p, cfg, x_a, bias_e, ctx_a)
    at_a, x_b = _dispatched(attn, to_a, x_a, attend, (x_b, *rest_b))
    to_b = gate(p, cfg, x_b, bias_e, ctx_b)
    at_b, (out_a, y_a) = _dispatched(ffn, to_b, x_b, routed_first, at_a)
    x_a, (out_b, y_b) = _combined(ffn, Done(out_a, y_a, to_a.plan), shared_first, at_b)
    s_bte, routing, counted_bt = joined(
        (to_a.s_bte, to_a.routing, ctx_a.counted_bt), (to_b.s_bte, to_b.routing, ctx_b.counted_bt)
    )
    stats = balance_stats(cfg, s_bte, routing, ctx_a.layout.sequence, counted_bt)
    return (x_a, Done(out_b, y_b, to_b.plan)), stats


# --- the stack ----------------------------------------------------------------------------------------------------


def _before_the_first(p: Params, cfg: ModelConfig, x_btd: jax.Array, ctx: Context) -> Done:
    """The state that half b begins with: a combine of zeros."""
    one = jax.tree.map(lambda w: w[0], p)
    plan = jax.eval_shape(lambda x: gate(one, cfg, x, None, ctx).plan, x_btd)
    plan = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), plan)
    y_rd = jnp.zeros((plan.hops[-1].rows, x_btd.shape[-1]), x_btd.dtype)
    return Done(x_btd, y_rd, plan.replace(fits_n=jnp.ones_like(plan.fits_n)))


def overlapped(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_le: jax.Array | None, ctx: Context
) -> tuple[jax.Array, BalanceStats]:
    """`block.stack` of MoE layers with a local batch in two halves, for the dispatcher `Ragged`."""
    (x_a, x_b), contexts = halves(x_btd), _contexts(ctx)
    routes = (None, None) if ctx.routes is None else tuple(jnp.split(ctx.routes, HALVES, axis=1))

    def body(carry, xs):  # type: ignore[no-untyped-def]
        (x, done), (p_layer, bias_e, given) = carry, xs
        a, b = (half._replace(routes=routes) for half, routes in zip(contexts, given, strict=True))
        return layer(p_layer, cfg, x, done, bias_e, (a, b))

    start = (x_a, _before_the_first(p, cfg, x_b, contexts[1]))
    end, stats = lax.scan(recompute(body, ctx.layout.remat), start, (p, bias_le, routes), unroll=unroll(p))
    x_a, done_b = end
    x_b, _ = _combined((), done_b, NOTHING, ())
    return joined(x_a, x_b), stats

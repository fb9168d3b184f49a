"""Two micro-batches in flight: one attends or computes while the other's tokens travel (report sections 3.2.1, 3.4).

The local batch is divided into two halves, a and b. The MoE layers run in four segments each, with half b half a
layer behind. Each segment has two stages (`side_by_side.py`), after the two hops of an exchange; the hop between
nodes, the slower one, is beside the larger part of the work:

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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.cache import LatentCache
from deepseek_jax.model.dispatch import Received
from deepseek_jax.model.ffn import mlp
from deepseek_jax.model.layers import Params
from deepseek_jax.model.router import BalanceStats, Routing, affinities, balance_stats, route
from deepseek_jax.model.transformer import (
    Context,
    after_norm,
    attention_inputs,
    attention_output,
    recompute,
    unroll,
)
from deepseek_jax.parallel.exchange.dispatcher import Ragged, Results, fitting
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
    """What each half shares; positions that all sequences have in common stay as they are."""
    ropes = halves(ctx.rope) if len(ctx.rope[0]) > 1 else (ctx.rope, ctx.rope)
    first, second = (
        ctx._replace(rope=rope, segments_bt=segments)
        for rope, segments in zip(ropes, halves(ctx.segments_bt), strict=True)
    )
    return first, second


# --- work ---------------------------------------------------------------------------------------------------------


def attention(cfg: ModelConfig, ctx: Context) -> Work:
    """Inputs (x [b, t, d], rope, segments) -> (x plus its attention, latents); in between, what the core reads."""

    def of(inputs: Any) -> tuple[jax.Array, Context]:
        x_btd, rope, segments_bt = inputs
        return x_btd, ctx._replace(rope=rope, segments_bt=segments_bt)

    def first(p: Params, inputs: Any) -> Any:
        x_btd, here = of(inputs)
        return attention_inputs(p, cfg, x_btd, here)

    def second(p: Params, inputs: Any, between: Any) -> tuple[jax.Array, LatentCache]:
        (x_btd, here), (read, latent) = of(inputs), between
        return x_btd + attention_output(p, cfg, read, here), latent

    return Work(first, second)


NOTHING = Work(lambda p, inputs: (), lambda p, inputs, between: ())


class AtExperts(NamedTuple):
    """A half past its dispatch: tokens as they are here, and rows that came."""

    x_btd: jax.Array
    h_btd: jax.Array
    weights_nk: jax.Array
    plan: Plan
    came: Received


class Done(NamedTuple):
    """A half before its combine: `x_btd` lacks only what `y_rd` adds."""

    x_btd: jax.Array
    y_rd: jax.Array
    plan: Plan


def expert_work(cfg: ModelConfig, experts: Ragged, remat: str, shared_first: bool) -> Work:
    """Inputs `AtExperts` -> (x [b, t, d], y [r, d]) of `Done`."""

    def shared(p: Params, at: AtExperts) -> jax.Array:
        if "shared" not in p["ffn"]:
            return at.x_btd
        if remat == "deepseek":  # from the norm's input, which is kept
            again = after_norm(lambda p, _, h_btd: mlp(p, h_btd), cfg, remat)
            return at.x_btd + again(p["ffn"]["shared"], p["ffn_norm_d"], at.x_btd)
        return at.x_btd + mlp(p["ffn"]["shared"], at.h_btd)

    def routed(p: Params, at: AtExperts) -> Results:
        h_nd = at.h_btd.reshape(-1, at.h_btd.shape[-1])
        return experts.experts(p["ffn"]["experts"], at.came, h_nd, at.weights_nk, at.plan)

    def result(x_btd: jax.Array, y: Results) -> tuple[jax.Array, jax.Array]:
        return x_btd if y.more_nd is None else x_btd + y.more_nd.reshape(x_btd.shape), y.y_rd

    if shared_first:
        return Work(shared, lambda p, at, x_btd: result(x_btd, routed(p, at)))
    return Work(routed, lambda p, at, outcome: result(shared(p, at), outcome))


# --- one layer ----------------------------------------------------------------------------------------------------


class Routed(NamedTuple):
    """A half before its dispatch."""

    h_btd: jax.Array
    s_bte: jax.Array
    routing: Routing
    weights_nk: jax.Array
    plan: Plan


def _routed(
    p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_e: Any, experts: Ragged, remat: str
) -> Routed:
    def gated(p: Params, cfg: ModelConfig, h_btd: jax.Array) -> tuple[jax.Array, jax.Array]:
        return h_btd, affinities(p, cfg, h_btd)

    h_btd, s_bte = after_norm(gated, cfg, remat)(p["ffn"]["gate"], p["ffn_norm_d"], x_btd)
    routing = route(cfg, s_bte, bias_e)
    ids_nk, weights_nk = (x.reshape(-1, x.shape[-1]) for x in routing)
    plan = experts.plan(ids_nk, p["ffn"]["experts"]["w_gate_edf"].shape[0])
    return Routed(h_btd, s_bte, routing, weights_nk, plan)


def _dispatched(p: Params, to: Routed, x_btd: jax.Array, work: Work, inputs: Any) -> tuple[AtExperts, Any]:
    """Dispatch of one half beside `work` of the other."""
    h_nd = to.h_btd.reshape(-1, to.h_btd.shape[-1])
    came, result = side_by_side(DISPATCH, work, (h_nd, to.weights_nk), to.plan, p, inputs)
    return AtExperts(x_btd, to.h_btd, to.weights_nk, to.plan, came), result


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
    experts: Ragged,
) -> tuple[tuple[jax.Array, Done], BalanceStats, LatentCache]:
    """One block for both halves; half b comes from the layer before, and leaves, with its combine to be done."""
    ctx, (rest_a, rest_b) = contexts[0], ((c.rope, c.segments_bt) for c in contexts)
    own: Any = None  # of each half, an argument
    remat = ctx.layout.remat
    attend = attention(cfg, ctx._replace(rope=own, segments_bt=own))
    routed_first, shared_first = (expert_work(cfg, experts, remat, first) for first in (False, True))
    attn, ffn = ({name: p[name] for name in (f"{part}_norm_d", part)} for part in ("attn", "ffn"))
    x_b, (x_a, latent_a) = _combined(attn, done_b, attend, (x_a, *rest_a))
    to_a = _routed(p, cfg, x_a, bias_e, experts, remat)
    at_a, (x_b, latent_b) = _dispatched(attn, to_a, x_a, attend, (x_b, *rest_b))
    to_b = _routed(p, cfg, x_b, bias_e, experts, remat)
    at_b, (out_a, y_a) = _dispatched(ffn, to_b, x_b, routed_first, at_a)
    done_a = Done(out_a, y_a, to_a.plan)
    x_a, (out_b, y_b) = _combined(ffn, done_a, shared_first, at_b)
    s_bte, routing = joined((to_a.s_bte, to_a.routing), (to_b.s_bte, to_b.routing))
    stats = balance_stats(cfg, s_bte, routing, ctx.layout.sequence)
    return (x_a, Done(out_b, y_b, to_b.plan)), stats, joined(latent_a, latent_b)


# --- the stack ----------------------------------------------------------------------------------------------------


def _from_no_layer(p: Params, cfg: ModelConfig, x_btd: jax.Array, experts: Ragged) -> Done:
    """A half with a combine that brings nothing, for the first layer."""
    one = jax.tree.map(lambda w: w[0], p)
    plan = jax.eval_shape(lambda x: _routed(one, cfg, x, None, experts, "none").plan, x_btd)
    plan = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), plan)
    y_rd = jnp.zeros((plan.hops[-1].rows, x_btd.shape[-1]), x_btd.dtype)
    return Done(x_btd, y_rd, plan.replace(fits_n=jnp.ones_like(plan.fits_n)))


def overlapped(experts: Ragged) -> Callable[..., Any]:
    """The `moe_stack` of a layout, for use inside `shard_map` with these experts."""

    def stack(
        p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_le: jax.Array | None, ctx: Context
    ) -> tuple[jax.Array, BalanceStats, LatentCache | None]:
        (x_a, x_b), contexts = halves(x_btd), _contexts(ctx)

        def body(carry, xs):  # type: ignore[no-untyped-def]
            (x, held), (p_layer, bias_e) = carry, xs
            carry, stats, latent = layer(p_layer, cfg, x, held, bias_e, contexts, experts)
            return carry, (stats, ctx.layout.sequence.cached(latent) if ctx.with_cache else None)

        start = (x_a, _from_no_layer(p, cfg, x_b, experts))
        end, (stats, latent) = lax.scan(
            recompute(body, ctx.layout.remat), start, (p, bias_le), unroll=unroll(p)
        )
        x_a, done_b = end
        x_b, _ = _combined((), done_b, NOTHING, ())
        return joined(x_a, x_b), stats, latent

    return stack

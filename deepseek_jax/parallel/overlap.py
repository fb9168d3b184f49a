"""Two micro-batches in flight: one attends or computes while the other's tokens travel (report sections 3.2.1, 3.4.1).

The local batch is divided into two halves, a and b. The MoE layers run in four segments each, with half b half a
layer behind:

    1  attention of a   | combine of b, from the layer before
    2  attention of b   | dispatch of a
    3  experts of a     | dispatch of b
    4  experts of b     | combine of a

A barrier after each segment keeps its computation and its exchange together; that they run at the same time is up to
the scheduler (`compiler.py`). The transpose of a segment is a segment: the gradient of a combine is a dispatch, that
of attention is attention's, and the transposed barriers keep them together. Hence the backward pass is
differentiation's, and overlaps as the forward pass does.

Results are those of the whole batch. Balance statistics are taken over both halves together.

Dims: b sequence, t token, d hidden, n = b * t token, r row received, k selected expert, e expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import Params, mlp, rms_norm
from deepseek_jax.model.router import Routing, affinities, balance_stats, route
from deepseek_jax.model.transformer import Context, Stack, attend, recompute, unroll
from deepseek_jax.parallel.experts import AtExperts, Done, MeshExperts

HALVES = 2


class Routed(NamedTuple):
    """Tokens of a half as the experts get them, and by which routing."""

    h_btd: jax.Array
    s_bte: jax.Array
    routing: Routing


class Pending(NamedTuple):
    """A half between its experts and its combine: `x_btd` holds all but what the routed experts add."""

    x_btd: jax.Array
    done: Done


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


def _contexts(ctx: Context) -> tuple[Context, Context]:
    """What each half shares; positions that all sequences have in common stay as they are."""
    ropes = halves(ctx.rope) if len(ctx.rope[0]) > 1 else (ctx.rope, ctx.rope)
    first, second = (
        ctx._replace(rope=rope, segments_bt=segments)
        for rope, segments in zip(ropes, halves(ctx.segments_bt), strict=True)
    )
    return first, second


def _together(*values: Any) -> Any:
    """End of a segment: nothing after it starts before all of `values` are there, forwards and backwards."""
    return lax.optimization_barrier(values)


def _routed(p: Params, cfg: ModelConfig, x_btd: jax.Array, bias_e: jax.Array | None) -> Routed:
    h_btd = rms_norm(x_btd, p["ffn_norm_d"], cfg.rms_norm_eps)
    s_bte = affinities(p["ffn"]["gate"], cfg, h_btd)
    return Routed(h_btd, s_bte, route(cfg, s_bte, bias_e))


def _send(p: Params, experts: MeshExperts, routed: Routed) -> AtExperts:
    k = routed.routing.experts_btk.shape[-1]
    ids_nk, weights_nk = (x.reshape(-1, k) for x in routed.routing)
    with jax.named_scope("plan"):
        plan = experts.plan(p["ffn"]["experts"]["w_gate_edf"].shape[0], ids_nk)
    with jax.named_scope("dispatch"):
        return experts.send(routed.h_btd.reshape(-1, routed.h_btd.shape[-1]), weights_nk, plan)


def _compute(
    p: Params, experts: MeshExperts, x_btd: jax.Array, h_btd: jax.Array, x_rd: jax.Array, at: AtExperts
) -> Pending:
    """Shared and routed experts; `x_rd` are the rows received, past the barrier."""
    if "shared" in p["ffn"]:
        x_btd = x_btd + mlp(p["ffn"]["shared"], h_btd)
    return Pending(x_btd, experts.compute(p["ffn"]["experts"], at._replace(x_rd=x_rd)))


def _collect(experts: MeshExperts, x_btd: jax.Array, y_rd: jax.Array, done: Done) -> jax.Array:
    """`y_rd` are the results of the rows received, past the barrier."""
    with jax.named_scope("combine"):
        y_nd = experts.collect(done._replace(y_rd=y_rd))
    return x_btd + y_nd.reshape(x_btd.shape)


def overlapped(experts: MeshExperts) -> Stack:
    """The `moe_stack` argument of `transformer.forward`, for use inside `shard_map` with these experts."""

    def layer(p, cfg, carry, bias_e, contexts):  # type: ignore[no-untyped-def]
        (x_a, held_b), (ctx_a, ctx_b) = carry, contexts
        with jax.named_scope("segment1"):
            x_a, latent_a = attend(p, cfg, x_a, ctx_a.rope, ctx_a.segments_bt)
            x_b = _collect(experts, held_b.x_btd, held_b.done.y_rd, held_b.done)
            x_a, x_b = _together(x_a, x_b)
        with jax.named_scope("segment2"):
            to_a = _routed(p, cfg, x_a, bias_e)
            at_a = _send(p, experts, to_a)
            x_b, latent_b = attend(p, cfg, x_b, ctx_b.rope, ctx_b.segments_bt)
            rows_a, x_b = _together(at_a.x_rd, x_b)
        with jax.named_scope("segment3"):
            to_b = _routed(p, cfg, x_b, bias_e)
            at_b = _send(p, experts, to_b)
            held_a = _compute(p, experts, x_a, to_a.h_btd, rows_a, at_a)
            y_a, rows_b = _together(held_a.done.y_rd, at_b.x_rd)
        with jax.named_scope("segment4"):
            x_a = _collect(experts, held_a.x_btd, y_a, held_a.done)
            held_b = _compute(p, experts, x_b, to_b.h_btd, rows_b, at_b)
            x_a, y_b = _together(x_a, held_b.done.y_rd)
        s, routing = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), (to_a.s_bte, to_a.routing), (to_b.s_bte, to_b.routing)
        )
        latent = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), latent_a, latent_b)
        held_b = held_b._replace(done=held_b.done._replace(y_rd=y_b))
        return (x_a, held_b), (balance_stats(cfg, s, routing), latent)

    def nothing(p, cfg, x_btd):  # type: ignore[no-untyped-def]
        """Pending of a half that comes from no layer: its combine brings nothing."""
        one = jax.tree.map(lambda w: w[0], p)

        def like(x):
            routed = _routed(one, cfg, x, None)
            return _compute(one, experts, x, routed.h_btd, (at := _send(one, experts, routed)).x_rd, at).done

        done = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(like, x_btd))
        return Pending(x_btd, done._replace(plan=done.plan._replace(fits_n=~done.plan.fits_n)))

    def stack(p, cfg, x_btd, bias_le, ctx):  # type: ignore[no-untyped-def]
        (x_a, x_b), contexts = halves(x_btd), _contexts(ctx)

        def body(carry, xs):
            carry, (stats, latent) = layer(*(xs[0], cfg, carry, xs[1], contexts))
            return carry, (stats, latent if ctx.with_cache else None)

        start = (x_a, nothing(p, cfg, x_b))
        (x_a, held_b), (stats, latent) = lax.scan(
            recompute(body, ctx.remat), start, (p, bias_le), unroll=unroll(p)
        )
        with jax.named_scope("last"):
            x_b = _collect(experts, held_b.x_btd, held_b.done.y_rd, held_b.done)
        return jnp.concatenate([x_a, x_b]), stats, latent

    return stack

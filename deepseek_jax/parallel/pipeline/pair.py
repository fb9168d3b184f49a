"""A forward and a backward of two micro-batches, layer beside layer (report, figure 4).

Of two MoE layers whose tokens travel, the forward one's phases hide the backward one's trips and the other way round:

    1  attention of F                               | combine of B: the gradients of its results, to the experts
    2  routed and shared experts of B               | dispatch of F
    3  their weight gradients; the experts of F     | dispatch of B: the gradients of its tokens, back
    4  attention of B, then its weight gradients    | combine of F

Each line is a segment (`parallel/side_by_side.py`) of two stages, in the order of the trip's hops. The weight gradients
of the experts lie beside the longer trip, as in DeepSeek's profile. Where the backward pass computes its layer again,
line 1 is two:

    1a attention of B again                         | combine of B
    1b attention of F                               | dispatch of B again

Nothing hides the plan of F, a few small collectives before line 2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from deepseek_jax.model.router import BalanceStats
from deepseek_jax.parallel.exchange.transport import COMBINE, DISPATCH
from deepseek_jax.parallel.pipeline.layer import (
    Backward,
    Hand,
    Kept,
    Travelling,
    Weights,
    added,
    at_experts,
    flat,
    merged,
    of_gate,
    of_results,
    values,
)
from deepseek_jax.parallel.side_by_side import Trip, segment

PAIR = "pair"  # name of the scope of a pair of layers

Ahead = tuple[Any, Any, Weights, Hand]  # (name, layer, weights, hand)
Back = tuple[Any, Any, Weights, Hand, Any]  # and what its forward pass kept


def pair(
    f: Travelling, wf: Weights, hf: Hand, x_btd: jax.Array, b: Travelling, wb: Weights, hb: Hand, at: Backward
) -> tuple[jax.Array, BalanceStats, Kept, jax.Array, Any]:
    """`f.forward` of one micro-batch beside `b.backward` and `b.weights` of another -> results of all three."""
    plan = at.kept.plan
    trip = Trip(DISPATCH, (flat(at.g_btd),), plan, after=x_btd)
    if b.again:
        g_came, attended = segment(trip, *b.attention(wb, hb), at.kept.x_btd)
        to_b, kept = b.gated(wb, hb, *attended)
        trip = Trip(DISPATCH, values(to_b), plan, after=g_came.x_rd)
        came_again, attended = segment(trip, *f.attention(wf, hf), x_btd)
        again = (to_b._replace(plan=plan), came_again)
    else:
        g_came, attended = segment(trip, *f.attention(wf, hf), x_btd)
        kept, again, came_again = at.kept, None, g_came
    to, kept_f = f.gated(wf, hf, *attended)

    # 2
    def compute_back(inputs: Any) -> Any:
        again, kept, g_rd, g_btd = inputs
        if again is not None:
            to_b, came_again = again
            kept = b.at_experts(wb, hb, to_b, came_again, kept)[2]
        return kept.shared, g_btd, b.experts.backward(wb, hb, kept.experts, of_results(g_rd, g_btd))

    def share_back(between: Any) -> Any:
        of_shared, g_btd, (d_at, cut) = between
        d_x, shared_cut = b.shared.backward(wb, hb, of_shared, g_btd)
        return d_at, d_x, (cut, shared_cut)

    trip = Trip(DISPATCH, values(to), to.plan, after=came_again.x_rd)
    inputs_back = (again, kept, g_came.x_rd, at.g_btd)
    came, (d_at, d_x, cuts) = segment(trip, compute_back, share_back, inputs_back)

    # 3
    def weigh_and_share(inputs: Any) -> Any:
        to, came, (cut, shared_cut) = inputs
        dp = added(b.experts.weights(wb, hb, cut), b.shared.weights(wb, hb, shared_cut))
        return to, came, dp, f.shared.forward(wf, hf, (to.x_btd, to.h_btd))

    def compute(between: Any) -> Any:
        to, came, dp, of_shared = between
        return dp, of_shared, f.experts.forward(wf, hf, at_experts(to, came))

    trip = Trip(COMBINE, DISPATCH.values(d_at[-1]), plan, after=came.x_rd)
    back, (dp, (shared_btd, of_shared), (y, of_experts)) = segment(
        trip, weigh_and_share, compute, (to, came, cuts)
    )

    # 4
    def leave_back(inputs: Any) -> Any:
        return b.before_experts(wb, hb, *inputs)

    def attend_back(between: Any) -> Any:
        dx_btd, cuts = between
        return dx_btd, b.weights(wb, hb, cuts)

    trip = Trip(COMBINE, (y.y_rd,), to.plan, after=back)
    before = kept._replace(x_btd=None, plan=None, shared=None, experts=None)
    d_to = of_gate(d_x, d_at, back, at.g_stats)
    (y_nd,), (dx_btd, dp_attention) = segment(trip, leave_back, attend_back, (before, d_to))
    y_btd = merged(shared_btd, y, y_nd, to.plan)
    of_f = f.to_keep(kept_f._replace(shared=of_shared, experts=of_experts))
    return y_btd, to.stats, of_f, dx_btd, added(dp, dp_attention)


def in_pairs(
    ahead: Sequence[Ahead],
    x_btd: jax.Array,
    back: Sequence[Back],
    g_btd: jax.Array,
    g_stats: Any,
    then: Callable[[Any, Any], Any],
) -> tuple[jax.Array, jax.Array, dict[Any, BalanceStats], list[Any], dict[Any, Any]]:
    """Layers `ahead` of one micro-batch, in order, beside layers `back` of another, the last first.

    Returns (stream, gradient, statistics by name, kept of each layer ahead, weight gradients by name). Layers in which
    nothing travels, and what one side has more, run alone. then: (tree, done) -> tree, which waits where it must.
    """
    stats, kept, grads, dp = {}, [], {}, None
    ahead, back = list(ahead), list(back)
    while ahead or back:
        travels_f, travels_b = (bool(side) and isinstance(side[0][1], Travelling) for side in (ahead, back))
        if travels_f and travels_b:
            (name, f_layer, wf, hf), (name_b, b_layer, wb, hb, of_b) = ahead.pop(0), back.pop(0)
            at = Backward(of_b, g_btd, g_stats)
            with jax.named_scope(PAIR):
                results = pair(f_layer, wf, hf, x_btd, b_layer, wb, hb, at)
            x_btd, stats[name], of_f, g_btd, dp = results
            kept.append(of_f)
            grads[name_b] = dp
        elif ahead and not (travels_f and back):
            name, f_layer, wf, hf = ahead.pop(0)
            x_btd, stats[name], of_f = f_layer.forward(wf, hf, x_btd)
            kept.append(of_f)
        else:
            name, b_layer, wb, hb, of_b = back.pop(0)
            g_btd, cut = b_layer.backward(wb, hb, Backward(of_b, g_btd, g_stats))
            grads[name] = dp = b_layer.weights(wb, hb, then(cut, g_btd))
        x_btd, g_btd = then((x_btd, g_btd), (x_btd, g_btd, dp))
    return x_btd, g_btd, stats, kept, grads

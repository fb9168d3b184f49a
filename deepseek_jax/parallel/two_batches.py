"""A pass over pages with its rows in two halves: one computes while the other's tokens travel (report section 3.4).

The phases of a MoE block (`model/moe.py`, `model/decoding.py`), of two halves a and b, in segments (`side_by_side.py`). Of
prompts, whose experts and attention take about as long (section 3.4.1), a layer is four of them:

    dispatch of a  | attention of b: projections, core and output
    dispatch of b  | experts of a: routed, shared
    combine of a   | experts of b: shared, routed
    combine of b   | attention of a in the next layer

In decoding, where attention takes longest (section 3.4.2), b is two of five stages behind a: projections; core and gate;
dispatch and shared experts; experts and combine; output. So a's exchange is beside b's attention, and b's beside that of a in
the next layer. Of an exchange's two hops the one between nodes takes longer, and has the longer part of the work:

    dispatch: between nodes | shared experts of the same half
              inside nodes  | down-projections of the other, whose latents go to their pages
    experts
    combine:  inside nodes  | queries of the other
              between nodes | core, output and gate of the other

Nothing is beside the first attention, the last combine and, in decoding, the experts. Of a prompt's gate, the plan's counts
are exchanged between segments. Dense layers, and what is before and behind the layers, run on all rows.

Pages are one array, which segments hand on in the order in which the halves attend: a half writes its latents, then reads; the
barriers put the other's write behind that read, where the schedule has it anyway. Were the two not in order, XLA would keep
what is read in a copy of all pages.

Halves are every other row, so that both have as many that count, or one more: rows that count come first in a program. A
single row is a chunk of one sequence, which is cut in the middle of the tokens that count: half b sees those of a, whose
latents each layer writes first.

Dims: b row, t token, d hidden, k selected expert.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.cache import PagedView
from deepseek_jax.model.decoding import (
    Chosen,
    attention_in,
    attention_out,
    attention_queries,
    before_experts,
    by_token,
    final_states,
)
from deepseek_jax.model.layers import Params
from deepseek_jax.model.layout import Context, Layout
from deepseek_jax.model.moe import AtExperts, Routed, experts, gate, shared
from deepseek_jax.model.router import expert_counts
from deepseek_jax.parallel.exchange.transport import Direction
from deepseek_jax.parallel.side_by_side import Trip, segment

# --- halves -------------------------------------------------------------------------------------------------------


class EveryOther:
    """Rows 0, 2, 4, ... and 1, 3, 5, ..."""

    def of(self, x_b: jax.Array, half: int) -> jax.Array:
        return x_b[half::2]

    def view(self, view: PagedView, half: int) -> PagedView:
        rows = view._replace(pages_lpsw=None)  # type: ignore[arg-type]
        return jax.tree.map(lambda x: self.of(x, half), rows).over(view.pages_lpsw)  # type: ignore[no-any-return]

    def joined(self, a: jax.Array, b: jax.Array) -> jax.Array:
        rows = np.arange(len(a) + len(b))
        return jnp.concatenate([a, b])[np.argsort(np.concatenate([rows[::2], rows[1::2]]))]


class InTheMiddle:
    """Of each row, which fills its t columns from the right: the first half of the tokens that count and the second, of t / 2
    columns each, filled likewise. behind_b: tokens of the second."""

    def __init__(self, view: PagedView):
        self.columns = view.positions_bt.shape[1]
        self.behind_b = view.counted_bt.sum(1, dtype=jnp.int32) // 2

    def _column(self, half: int) -> jax.Array:
        """Of each entry of a half, where it was [b, t / 2]."""
        first_b = self.columns // 2 - self.behind_b * (half == 0)
        return first_b[:, None] + jnp.arange(self.columns // 2, dtype=jnp.int32)[None]

    def of(self, x_bt: jax.Array, half: int) -> jax.Array:
        column_bt = self._column(half)
        return jnp.take_along_axis(x_bt, column_bt.reshape(*column_bt.shape, *[1] * (x_bt.ndim - 2)), axis=1)

    def view(self, view: PagedView, half: int) -> PagedView:
        positions_bt = self.of(view.positions_bt, half)
        if half == 0:
            return view._replace(
                lengths=jnp.maximum(view.lengths - self.behind_b, 0), positions_bt=positions_bt
            )
        there_bt = self._column(half) >= self.columns - self.behind_b[:, None]
        return view._replace(positions_bt=jnp.where(there_bt, positions_bt, -1))

    def joined(self, a: jax.Array, b: jax.Array) -> jax.Array:
        column, behind_b1 = jnp.arange(self.columns, dtype=jnp.int32)[None], self.behind_b[:, None]
        of_a = jnp.maximum(column - self.columns // 2 + behind_b1, 0)
        at_bt = jnp.where(column >= self.columns - behind_b1, column, of_a)
        x_btd = jnp.concatenate([a, b], axis=1)
        return jnp.take_along_axis(x_btd, at_bt.reshape(*at_bt.shape, *[1] * (x_btd.ndim - 2)), axis=1)


def cut(view: PagedView) -> EveryOther | InTheMiddle:
    """How the rows of a view are halved."""
    return EveryOther() if len(view.lengths) > 1 else InTheMiddle(view)


def divides(rows: int, tokens: int, parts: int) -> bool:
    """Whether `rows` of `tokens` columns, whose sequences are divided over so many devices, have halves."""
    return rows > 1 or tokens % (2 * parts) == 0


# --- a layer of a half --------------------------------------------------------------------------------------------


class Half(NamedTuple):
    """What its layers share; the pages of `view` are those that a phase is given. name: "a" or "b", before the name of a phase
    in the names of operations, for whoever reads a compiled program."""

    name: str
    ctx: Context
    view: Any


class Gated(NamedTuple):
    """A half before its dispatch: the stream [b, t, d], and the tokens behind the gate."""

    x_btd: jax.Array
    to: Routed

    @property
    def experts_btk(self) -> jax.Array:
        return self.to.routing.experts_btk

    def at_experts(self, received: Any = None) -> AtExperts:
        return AtExperts(self.x_btd, self.to.h_btd, self.to.values[1], self.to.plan, received)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The phases of MoE layer i of a half."""

    cfg: ModelConfig
    p: Params
    bias_e: Any
    i: Any
    half: Half

    def _named(self, phase: str) -> Any:
        return jax.named_scope(f"{self.half.name}.{phase}")

    def down(self, x_btd: jax.Array, pages_lpsw: jax.Array) -> tuple[Any, jax.Array]:
        view = self.half.view.over(pages_lpsw)
        with self._named("down"):
            low, view = attention_in(self.p, self.cfg, x_btd, view, self.i, self.half.ctx)
        return low, view.pages_lpsw

    def queries(self, low: Any) -> Any:
        with self._named("queries"):
            return attention_queries(self.p, self.cfg, low, self.half.view, self.half.ctx)

    def attended(self, x_btd: jax.Array, q: Any, pages_lpsw: jax.Array) -> jax.Array:
        view = self.half.view.over(pages_lpsw)
        with self._named("attention"):
            return attention_out(self.p, self.cfg, x_btd, q, view, self.i, self.half.ctx)

    def gated(self, x_btd: jax.Array) -> Gated:
        with self._named("gate"):
            return Gated(x_btd, gate(self.p, self.cfg, x_btd, self.bias_e, self.half.ctx))

    def shared(self, gated: Gated) -> jax.Array:
        with self._named("shared"):
            return shared(self.p, self.cfg, gated.at_experts(), self.half.ctx)

    def experts(self, gated: Gated, received: Any) -> Any:
        with self._named("experts"):
            return experts(self.p, gated.at_experts(received), self.half.ctx)

    def dispatch(self, gated: Gated, after: Any = None) -> Trip:
        return Trip(self._way(0), gated.to.values, gated.to.plan, after)

    def combine(self, gated: Gated, y: Any, after: Any = None) -> Trip:
        return Trip(self._way(1), y, gated.to.plan, after)

    def _way(self, i: int) -> Direction:
        way: Direction = self.half.ctx.layout.dispatcher.ways[i]  # type: ignore[attr-defined]
        return way._replace(name=f"{self.half.name}.{way.name}")


def _added(x_btd: jax.Array, y_nd: jax.Array) -> jax.Array:
    return x_btd + y_nd.reshape(x_btd.shape)


# a in front of its dispatch in layer i, b in front of its attention there, and the pages.
Carry = tuple[Any, jax.Array, jax.Array]
# Layer i of a and b, layer i + 1 of a, if there is one, and the carry -> that of layer i + 1, or both streams and the pages behind
# the last; and b in front of its dispatch.
Order = Callable[[Layer, Layer, Layer | None, Carry], tuple[Carry, Gated]]


# --- decoding -----------------------------------------------------------------------------------------------------


def _beside(
    mine: Layer, other: Layer | None, gated: Gated, x_other: jax.Array, pages_lpsw: jax.Array
) -> tuple[jax.Array, Any, jax.Array]:
    """The exchange and the experts of one half, beside the attention of the other, if there is one -> (x of the one behind its
    layer, the other in front of its dispatch or as it is, pages)."""

    def down(x_mine: jax.Array, x_btd: jax.Array, pages_lpsw: jax.Array) -> Any:
        low, pages_lpsw = ((), pages_lpsw) if other is None else other.down(x_btd, pages_lpsw)
        return x_mine, x_btd, low, pages_lpsw

    def queries(x_btd: jax.Array, low: Any, pages_lpsw: jax.Array) -> Any:
        return x_btd, low if other is None else other.queries(low), pages_lpsw

    def attended(x_btd: jax.Array, q: Any, pages_lpsw: jax.Array) -> Any:
        return x_btd if other is None else other.gated(other.attended(x_btd, q, pages_lpsw)), pages_lpsw

    received, (x_mine, x_other, low, pages_lpsw) = segment(
        mine.dispatch(gated),
        lambda inputs: (mine.shared(inputs[0]), *inputs[1:]),
        lambda between: down(*between),
        (gated, x_other, pages_lpsw),
    )
    y = mine.experts(gated, received)
    y_nd, (then, pages_lpsw) = segment(
        mine.combine(gated, y), lambda x: queries(*x), lambda x: attended(*x), (x_other, low, pages_lpsw)
    )
    return _added(x_mine, y_nd), then, pages_lpsw


def decoding(a: Layer, b: Layer, following: Layer | None, carry: Carry) -> tuple[Carry, Gated]:
    """An `Order`."""
    gated_a, x_b, pages_lpsw = carry
    x_a, gated_b, pages_lpsw = _beside(a, b, gated_a, x_b, pages_lpsw)
    x_b, then_a, pages_lpsw = _beside(b, following, gated_b, x_a, pages_lpsw)
    return (then_a, x_b, pages_lpsw), gated_b


# --- prompts ------------------------------------------------------------------------------------------------------


def _attention(layer: Layer) -> tuple[Any, Any]:
    """In two parts, of (x, pages) -> (x, pages)."""

    def first(inputs: Any) -> Any:
        x_btd, pages_lpsw = inputs
        low, pages_lpsw = layer.down(x_btd, pages_lpsw)
        return x_btd, layer.queries(low), pages_lpsw

    return first, lambda between: (layer.attended(*between), between[-1])


def prompts(a: Layer, b: Layer, following: Layer | None, carry: Carry) -> tuple[Carry, Gated]:
    """An `Order`."""
    gated_a, x_b, pages_lpsw = carry
    received_a, (x_b, pages_lpsw) = segment(a.dispatch(gated_a), *_attention(b), (x_b, pages_lpsw))
    gated_b = b.gated(x_b)
    received_b, (x_a, y_a) = segment(
        b.dispatch(gated_b, after=received_a),
        lambda inputs: (inputs[0], a.experts(*inputs)),
        lambda between: (a.shared(between[0]), between[1]),
        (gated_a, received_a),
    )
    y_nd, (x_b, y_b) = segment(
        a.combine(gated_a, y_a, after=received_b),
        lambda inputs: (b.shared(inputs[0]), *inputs),
        lambda between: (between[0], b.experts(*between[1:])),
        (gated_b, received_b),
    )
    work = () if following is None else _attention(following)
    x_a = _added(x_a, y_nd)
    y_nd, done = segment(b.combine(gated_b, y_b), *work, inputs=(x_a, pages_lpsw))  # type: ignore[misc]
    x_b = _added(x_b, y_nd)
    if following is None:
        return (x_a, x_b, pages_lpsw), gated_b
    x_a, pages_lpsw = done
    return (following.gated(x_a), x_b, pages_lpsw), gated_b


# --- a pass -------------------------------------------------------------------------------------------------------


def _layers(
    order: Order, cfg: ModelConfig, stack: Any, bias_le: Any, halves: Any, x_a: Any, x_b: Any, pages_lpsw: Any
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """All MoE layers: listed, or on a stack, and then scanned -> both streams, the pages, the experts of both [l, b, t, k]."""

    def at(i: Any, half: Half) -> Layer:
        def of_layer(w: jax.Array) -> jax.Array:
            return lax.dynamic_index_in_dim(w, i, keepdims=False)

        p = stack[i] if listed else jax.tree.map(of_layer, stack)
        bias_e = None if bias_le is None else of_layer(bias_le)
        return Layer(cfg, p, bias_e, cfg.first_k_dense_replace + i, half)

    def one(carry: Carry, i: Any, last: bool = False) -> tuple[Carry, Any]:
        a, b = (at(i, half) for half in halves)
        then, gated_b = order(a, b, None if last else at(i + 1, halves[0]), carry)
        return then, (carry[0].experts_btk, gated_b.experts_btk)

    listed, n, k = isinstance(stack, list), cfg.num_moe_layers, cfg.num_experts_per_tok
    first, then = _attention(at(0, halves[0]))
    x_a, pages_lpsw = then(first((x_a, pages_lpsw)))
    carry = at(0, halves[0]).gated(x_a), x_b, pages_lpsw
    chosen = tuple(jnp.zeros((n, *x.shape[:2], k), jnp.int32) for x in (x_a, x_b))

    def keeping(i: Any, carry: Carry, chosen: Any, last: bool = False) -> Any:
        carry, of_layer = one(carry, i, last)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
        return i + 1, carry, jax.tree.map(put, chosen, of_layer)

    if listed:
        for i in range(n - 1):
            _, carry, chosen = keeping(i, carry, chosen)
    else:  # by one counter, of which XLA knows where a layer's weights begin: it reads them in place
        start = jnp.int32(0), carry, chosen
        _, carry, chosen = lax.while_loop(lambda at: at[0] < n - 1, lambda at: keeping(*at), start)
    _, carry, chosen = keeping(n - 1, carry, chosen, last=True)
    return *carry, chosen


def in_two(
    order: Order,
    ready: Params,
    cfg: ModelConfig,
    tokens_bt: jax.Array,
    view: PagedView,
    balance_bias: jax.Array | None,
    layout: Layout,
) -> tuple[jax.Array, PagedView, Chosen]:
    """`decoding.decode` with the rows in halves: the same to rounding, and bit for bit where a row's sums do not depend on how
    many rows there are.

    order: `decoding` or `prompts`. layout: whose dispatcher has `ways`.
    """
    how = cut(view)
    if layout.sequence.parts == 1:
        x_btd, view, ctx = before_experts(ready, cfg, tokens_bt, view, layout)
        xs = [how.of(x_btd, half) for half in (0, 1)]
        halves = [_half(how, half, view, ctx) for half in (0, 1)]
    else:  # each device has a part of the tokens of all rows: halves are made of its own rows, first of all
        xs, halves = [], []
        for half in (0, 1):
            tokens, of_half = how.of(tokens_bt, half), how.view(view, half)
            x_btd, of_half, ctx = before_experts(ready, cfg, tokens, of_half, layout)
            view = view.over(of_half.pages_lpsw)
            xs.append(x_btd)
            halves.append(Half("ab"[half], ctx, of_half))
    bias_le = None if balance_bias is None else balance_bias[: cfg.num_moe_layers]
    x_a, x_b, pages_lpsw, experts = _layers(
        order, cfg, ready["moe_layers"], bias_le, halves, xs[0], xs[1], view.pages_lpsw
    )
    states = (final_states(ready, cfg, x_btd, layout) for x_btd in (x_a, x_b))
    counted = (jax.vmap(lambda ids: expert_counts(ids, cfg.n_routed_experts))(ids) for ids in experts)
    counts_le = functools.reduce(jnp.add, counted)
    a, b = (by_token(Chosen(counts_le, ids), layout).experts_btlk for ids in experts)
    return how.joined(*states), view.over(pages_lpsw), Chosen(counts_le, how.joined(a, b))


def _half(how: EveryOther | InTheMiddle, half: int, view: PagedView, ctx: Context) -> Half:
    """Of rows of which each device has its own."""
    here = how.view(view, half)
    cos, sin = ctx.rope
    rope = how.of(cos, half), how.of(sin, half)
    return Half("ab"[half], ctx._replace(rope=rope, counted_bt=here.counted_bt), here)

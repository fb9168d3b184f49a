"""A layer of a pipeline stage: forward pass, input gradient and weight gradients apart, phase by phase.

The phases are those of `model/block.py`. Each is a `Phase`, whose backward pass `split_grad.py` takes apart. A MoE layer
whose tokens travel is five of them and two trips:

    attention_in, attention_out, gate | dispatch | shared, experts | combine

which `pair.py` runs beside those of another micro-batch that goes backward. Every other layer is one phase.

Dims: b sequence, t token, d hidden, n = b * t, r row received.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import attention_in, attention_out, block
from deepseek_jax.model.dispatch import Local
from deepseek_jax.model.layout import Context, Layout
from deepseek_jax.model.mla import Rope
from deepseek_jax.model.moe import AtExperts, experts, gate, shared
from deepseek_jax.model.router import BalanceStats, balance_stats
from deepseek_jax.model.weights import attach
from deepseek_jax.parallel.exchange.dispatcher import Results, fitting
from deepseek_jax.parallel.exchange.transport import COMBINE, DISPATCH
from deepseek_jax.parallel.pipeline.split_grad import Split, split
from deepseek_jax.precision.policy import Policy


class Weights(NamedTuple):
    """Of one layer. params: as the forward pass reads them, differentiated; operands: quantised, or None for each."""

    params: Any
    operands: Any


class Hand(NamedTuple):
    """What a layer reads of a micro-batch beside the stream, made again from the batch whenever it is needed. routes: as in
    `Context`."""

    rope: Rope
    segments_bt: jax.Array | None
    counted_bt: jax.Array | None
    bias_e: jax.Array | None = None
    routes: jax.Array | None = None

    def context(self, layout: Layout) -> Context:
        return Context(self.rope, layout, self.segments_bt, self.counted_bt, self.routes)


def picked(tree: Any, names: Any) -> Any:
    """The part of nested dicts that `names` names: {"attn": True, "ffn": {"gate": True}}; True for all of it."""
    if names is True or tree is None:
        return tree
    return {name: picked(tree[name], below) for name, below in names.items() if name in tree}


def added(a: Any, b: Any) -> Any:
    """Sums of two trees of gradients; what only one has is its own."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, dict):
        return {name: added(a.get(name), b.get(name)) for name in {**a, **b}}
    return jax.tree.map(lambda x, y: x + y, a, b)


class Phase:
    """fn(p, hand, x) -> out with its gradients apart. `names`: of the layer's parameters that it reads.

    The first call of `forward` fixes shapes; every part is traced once, for all layers and programs. Gradients of integers
    are None, and None in g stands for none at all.
    """

    def __init__(self, fn: Callable[[Any, Hand, Any], Any], names: Any, policy: Policy | None):
        self._names = names
        self._fn = lambda p, hand, x: fn(attach(p, hand[0], policy, adds=policy is not None), hand[1], x)
        self._split: Split | None = None

    def _arguments(self, w: Weights, hand: Hand) -> tuple[Any, Any]:
        return picked(w.params, self._names), (picked(w.operands, self._names), hand)

    def forward(self, w: Weights, hand: Hand, x: Any) -> tuple[Any, Any]:
        """(out, what the backward pass needs)"""
        p, at_hand = self._arguments(w, hand)
        if self._split is None:
            self._split = split(self._fn, p, at_hand, x)
        return self._split.forward(p, at_hand, x)

    def backward(self, w: Weights, hand: Hand, saved: Any, g: Any) -> tuple[Any, Any]:
        """(gradient of x, what `weights` needs)"""
        assert self._split is not None
        g = jax.tree.map(
            lambda g, out: jax.tree.map(lambda _: None, out) if g is None or out is None else g,
            g,
            self._split.out,
            is_leaf=lambda g: g is None,
        )
        return self._split.backward(*self._arguments(w, hand), saved, g)

    def weights(self, w: Weights, hand: Hand, cut: Any) -> Any:
        """Gradients of the parameters it reads."""
        assert self._split is not None
        return self._split.weights(*self._arguments(w, hand), cut)


class Backward(NamedTuple):
    """What a backward pass of a layer starts from. g_btd: gradient of its output; g_stats: of its balance losses."""

    kept: Any
    g_btd: jax.Array
    g_stats: tuple[jax.Array, jax.Array]


class Whole:
    """A layer in one phase: dense, or a MoE layer of a single device."""

    def __init__(self, cfg: ModelConfig, layout: Layout, policy: Policy | None):
        def run(p: Any, hand: Hand, x_btd: jax.Array) -> tuple[jax.Array, BalanceStats]:
            return block(p, cfg, x_btd, hand.bias_e, hand.context(layout))

        self._again = layout.remat == "full"
        self._phase = Phase(run, True, policy)

    def forward(self, w: Weights, hand: Hand, x_btd: jax.Array) -> tuple[jax.Array, BalanceStats, Any]:
        """(x, statistics, what the backward pass needs)"""
        (y_btd, stats), saved = self._phase.forward(w, hand, x_btd)
        return y_btd, stats, x_btd if self._again else saved

    def backward(self, w: Weights, hand: Hand, at: Backward) -> tuple[jax.Array, Any]:
        """(gradient of the input, what `weights` needs)"""
        saved = self._phase.forward(w, hand, at.kept)[1] if self._again else at.kept
        return self._phase.backward(w, hand, saved, (at.g_btd, _of_losses(at.g_stats)))

    def weights(self, w: Weights, hand: Hand, cut: Any) -> Any:
        return self._phase.weights(w, hand, cut)


# --- a layer whose tokens travel ----------------------------------------------------------------------------------


class Kept(NamedTuple):
    """Of each phase what its backward pass needs; plan: of the exchange. Under recomputation x and plan alone."""

    x_btd: Any
    plan: Any
    attention_in: Any = None
    attention_out: Any = None
    gate: Any = None
    shared: Any = None
    experts: Any = None


class Cuts(NamedTuple):
    """Of each phase what its weight gradients need."""

    attention_in: Any
    attention_out: Any
    gate: Any
    shared: Any
    experts: Any


class ToExperts(NamedTuple):
    """After the gate: the stream, normed tokens, routing weights, balance losses and load, the plan."""

    x_btd: jax.Array
    h_btd: jax.Array
    weights_nk: jax.Array
    stats: BalanceStats
    plan: Any


class Travelling:
    """A MoE layer whose tokens travel by the dispatcher `Ragged`, in five phases. again: its backward pass computes it
    again, from its input and the plan."""

    def __init__(self, cfg: ModelConfig, layout: Layout, n_local: int, policy: Policy | None):
        def ctx(hand: Hand) -> Context:
            return hand.context(layout)

        def enter(p: Any, hand: Hand, x_btd: jax.Array) -> Any:
            return attention_in(p, cfg, x_btd, ctx(hand))

        def leave(p: Any, hand: Hand, x: Any) -> jax.Array:
            x_btd, read = x
            return attention_out(p, cfg, x_btd, read, ctx(hand))

        def choose(p: Any, hand: Hand, x_btd: jax.Array) -> ToExperts:
            held = {"w_down_efd": jax.ShapeDtypeStruct((n_local,), x_btd.dtype)}
            to = gate(p | {"ffn": p["ffn"] | {"experts": held}}, cfg, x_btd, hand.bias_e, ctx(hand))
            stats = balance_stats(cfg, to.s_bte, to.routing, layout.sequence, hand.counted_bt)
            return ToExperts(x_btd, to.h_btd, to.values[1], stats, to.plan)

        def share(p: Any, hand: Hand, x: Any) -> jax.Array:
            return shared(p, cfg, _at(*x), ctx(hand))

        def compute(p: Any, hand: Hand, x: Any) -> Any:
            return experts(p, _at(None, *x), ctx(hand))

        self.again = layout.remat == "full"
        self.attention_in = Phase(enter, {"attn_norm_d": True, "attn": True}, policy)
        self.attention_out = Phase(leave, {"attn": True}, policy)
        self.gate = Phase(choose, {"ffn_norm_d": True, "ffn": {"gate": True}}, policy)
        self.shared = Phase(share, {"ffn_norm_d": True, "ffn": {"shared": True}}, policy)
        self.experts = Phase(compute, {"ffn": {"experts": True}}, policy)

    def forward(self, w: Weights, hand: Hand, x_btd: jax.Array) -> tuple[jax.Array, BalanceStats, Kept]:
        to, kept = self.to_experts(w, hand, x_btd)
        came = DISPATCH(values(to), to.plan)
        shared_btd, y, kept = self.at_experts(w, hand, to, came, kept)
        (y_nd,) = COMBINE((y.y_rd,), to.plan)
        return merged(shared_btd, y, y_nd, to.plan), to.stats, self.to_keep(kept)

    def attention(self, w: Weights, hand: Hand) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """Its two parts: x [b, t, d] -> between -> (x with its attention, kept)."""

        def enter(x_btd: jax.Array) -> Any:
            return x_btd, *self.attention_in.forward(w, hand, x_btd)

        def leave(between: Any) -> Any:
            x_btd, read, entered = between
            attended_btd, left = self.attention_out.forward(w, hand, (x_btd, read))
            return attended_btd, Kept(x_btd, None, entered, left)

        return enter, leave

    def gated(self, w: Weights, hand: Hand, attended_btd: jax.Array, kept: Kept) -> tuple[ToExperts, Kept]:
        """What follows `attention`, up to the dispatch."""
        to, chosen = self.gate.forward(w, hand, attended_btd)
        return to, kept._replace(plan=to.plan, gate=chosen)

    def to_experts(self, w: Weights, hand: Hand, x_btd: jax.Array) -> tuple[ToExperts, Kept]:
        """All that is before the dispatch."""
        enter, leave = self.attention(w, hand)
        return self.gated(w, hand, *leave(enter(x_btd)))

    def at_experts(self, w: Weights, hand: Hand, to: ToExperts, came: Any, kept: Kept) -> Any:
        """What is between dispatch and combine: (stream with the shared experts, `Results`, kept)"""
        shared_btd, of_shared = self.shared.forward(w, hand, (to.x_btd, to.h_btd))
        y, of_experts = self.experts.forward(w, hand, at_experts(to, came))
        return shared_btd, y, kept._replace(shared=of_shared, experts=of_experts)

    def to_keep(self, kept: Kept) -> Kept:
        """What the recomputation policy leaves."""
        return Kept(kept.x_btd, kept.plan) if self.again else kept._replace(x_btd=None)

    def _restored(self, w: Weights, hand: Hand, kept: Kept) -> Kept:
        """The inverse of `to_keep`."""
        if not self.again:
            return kept
        to, found = self.to_experts(w, hand, kept.x_btd)
        to, found = to._replace(plan=kept.plan), found._replace(plan=kept.plan)
        return self.at_experts(w, hand, to, DISPATCH(values(to), kept.plan), found)[2]

    def backward(self, w: Weights, hand: Hand, at: Backward) -> tuple[jax.Array, Cuts]:
        kept = self._restored(w, hand, at.kept)
        g_rd = DISPATCH((flat(at.g_btd),), kept.plan).x_rd
        d_at, of_experts = self.experts.backward(w, hand, kept.experts, of_results(g_rd, at.g_btd))
        d_x, of_shared = self.shared.backward(w, hand, kept.shared, at.g_btd)
        back = COMBINE(DISPATCH.values(d_at[-1]), kept.plan)
        dx_btd, cuts = self.before_experts(w, hand, kept, of_gate(d_x, d_at, back, at.g_stats))
        return dx_btd, cuts._replace(shared=of_shared, experts=of_experts)

    def before_experts(self, w: Weights, hand: Hand, kept: Kept, d_to: ToExperts) -> tuple[jax.Array, Cuts]:
        """The backward pass of `to_experts`: gradient of the input, and what the weights of its phases need."""
        d_attended, chosen = self.gate.backward(w, hand, kept.gate, d_to)
        (dx_btd, d_read), left = self.attention_out.backward(w, hand, kept.attention_out, d_attended)
        d_in, entered = self.attention_in.backward(w, hand, kept.attention_in, d_read)
        return dx_btd + d_in, Cuts(entered, left, chosen, None, None)

    def weights(self, w: Weights, hand: Hand, cuts: Cuts) -> Any:
        """Gradients of the parameters of all phases that left something."""
        total = None
        for name, cut in cuts._asdict().items():
            if cut is not None:
                total = added(total, getattr(self, name).weights(w, hand, cut))
        return total


def layer(
    cfg: ModelConfig, layout: Layout, policy: Policy | None, moe: bool, n_local: int
) -> Whole | Travelling:
    """The layer of a kind. n_local: routed experts on this device."""
    if moe and not isinstance(layout.dispatcher, Local):
        return Travelling(cfg, layout, n_local, policy)
    return Whole(cfg, layout, policy)


# --- between phases and trips -------------------------------------------------------------------------------------


def _at(x_btd: Any, h_btd: Any, weights_nk: Any = None, plan: Any = None, came: Any = None) -> AtExperts:
    """What one of the phases after a dispatch reads; they do not read all of it."""
    return AtExperts(x_btd, h_btd, weights_nk, plan, came)


def _of_losses(g_stats: Any) -> BalanceStats:
    """Gradients of the balance losses; the load has none."""
    return BalanceStats(None, *g_stats)  # type: ignore[arg-type]


def flat(x_btd: jax.Array) -> jax.Array:
    return x_btd.reshape(-1, x_btd.shape[-1])


def values(to: ToExperts) -> tuple[jax.Array, jax.Array]:
    """What a dispatch brings to the experts."""
    return flat(to.h_btd), to.weights_nk


def at_experts(to: ToExperts, came: Any) -> Any:
    """The input of the phase `experts`."""
    return to.h_btd, to.weights_nk, to.plan, came


def merged(shared_btd: jax.Array, y: Any, y_nd: jax.Array, plan: Any) -> jax.Array:
    """The stream with shared and routed experts, once the combine is done."""
    if y.more_nd is not None:
        shared_btd = shared_btd + y.more_nd.reshape(shared_btd.shape)
    return shared_btd + fitting(y_nd, plan).reshape(shared_btd.shape)


def of_results(g_rd: jax.Array, g_btd: jax.Array) -> Any:
    """Gradients of `dispatcher.Results`."""
    return Results(g_rd, flat(g_btd))


def of_gate(d_x: Any, d_at: Any, back: Any, g_stats: Any) -> ToExperts:
    """The gradient of `ToExperts`, of what shared and routed experts read of it, here and elsewhere."""
    (d_x_btd, d_h_btd), (d_h_experts, d_weights_nk, *_), (d_h_nd, d_weights) = d_x, d_at, back
    h_btd = d_h_nd.reshape(d_x_btd.shape)
    for more in (d_h_btd, d_h_experts):
        h_btd = h_btd if more is None else h_btd + more
    weights_nk = d_weights if d_weights_nk is None else d_weights + d_weights_nk
    return ToExperts(d_x_btd, h_btd, weights_nk, _of_losses(g_stats), None)

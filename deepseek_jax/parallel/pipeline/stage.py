"""What a stage of the pipeline does with a micro-batch: forward, backward, weight gradients.

A stage runs its layers (`layer.py`); the first one begins with the embedding, the last one ends with final norm, MTP
modules and the objective. The last stage's end is run forward and backward at once, in the backward pass: nothing of it
waits in between, and its weight gradients neither.

Balance losses are part of every MoE layer's stage. An objective must be linear in them: each layer contributes its own,
and the rest of the objective is computed once, at the end.

Dims: b sequence, t token, w window, d hidden, l layer, e expert.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import embed, head_weight
from deepseek_jax.model.layout import Inputs, Layout
from deepseek_jax.model.mtp import mtp_hidden
from deepseek_jax.model.router import BalanceStats
from deepseek_jax.model.transformer import Aux, context, final_norm
from deepseek_jax.model.weights import adding, attach
from deepseek_jax.parallel.exchange.order import after
from deepseek_jax.parallel.pipeline.layer import Backward, Hand, Weights, layer
from deepseek_jax.parallel.pipeline.pair import in_pairs
from deepseek_jax.parallel.pipeline.stages import KINDS, Content, Held
from deepseek_jax.parallel.pipeline.traced import traced_once
from deepseek_jax.precision.policy import Policy

_NO_LOADS: Any = None  # an objective cannot read loads: no rank has those of all layers
END = ("embed", "final_norm", "head", "mtp")
Scalars = dict[str, jax.Array]


class MicroBatches(NamedTuple):
    """A device's micro-batches. part: of an index, which other functions take; rows: sequences of each.

    objective: (part, states [b, t, d] after the final norm, head [d, v], `Aux`) -> (scalar, metrics)
    """

    part: Callable[[jax.Array], Any]
    inputs: Callable[[Any], Inputs]
    objective: Callable[[Any, jax.Array, jax.Array, Aux], tuple[jax.Array, Scalars]]
    rows: int
    tokens: int


class Done(NamedTuple):
    """What a stage adds to the step: metrics, loads of its MoE layers [slot, e], those of MTP modules."""

    metrics: Scalars
    counts_se: jax.Array
    mtp_counts_ke: jax.Array


class Gathered(NamedTuple):
    """What a rank has all step long. params, operands: of its slots; bias_le: of all MoE layers."""

    params: Any
    operands: Any
    bias_le: jax.Array


class Stages:
    """The stages that the ranks hold, inside `shard_map`, on one device. rank: its index, a traced number."""

    def __init__(
        self,
        cfg: ModelConfig,
        layout: Layout,
        policy: Policy | None,
        held: Held,
        gathered: Gathered,
        batch: MicroBatches,
    ):
        self.cfg, self.layout, self.held, self.gathered, self.batch = cfg, layout, held, gathered, batch
        self._policy, self.rank = policy, lax.axis_index("pipe")
        params, operands, _ = gathered
        n_local = 0
        if cfg.num_moe_layers:
            n_local = params["moe_layers"]["ffn"]["experts"]["w_gate_edf"].shape[1]
        self.layers = {kind: layer(cfg, layout, policy, kind == "moe_layers", n_local) for kind in KINDS}
        self._apart = {kind: self._slots(kind) for kind in KINDS if kind in params}
        self.added = {kind: adding(params[kind], operands[kind], policy) for kind in self._apart}
        self._end_gradients: Any = None
        self._rates = traced_once(self._rates_of)
        self._end, self._end_operands = (
            {name: tree[name] for name in END if name in tree} for tree in (params, operands)
        )

    def _slots(self, kind: str) -> list[Weights]:
        """The weights of every slot: arrays of their own, which kernels read where they are."""
        n = jax.tree.leaves(self.gathered.params[kind])[0].shape[0]
        trees = (self.gathered.params[kind], self.gathered.operands[kind])
        return [Weights(*jax.tree.map(lambda w, i=i: w[i], trees)) for i in range(n)]

    # --- micro-batches ----------------------------------------------------------------------------------------------

    @property
    def stream(self) -> jax.ShapeDtypeStruct:
        """What stages hand over."""
        shape = (self.batch.rows, self.batch.tokens // self.layout.sequence.parts, self.cfg.hidden_size)
        return jax.ShapeDtypeStruct(shape, self.cfg.dtype)

    def _hand(self, part: Any) -> Hand:
        ctx = context(self.cfg, self.batch.inputs(part), self.layout)
        return Hand(ctx.rope, ctx.segments_bt, ctx.counted_bt, routes=ctx.routes)

    def _layers(self, chunk: int, content: Content) -> list[tuple[str, int]]:
        """(kind, slot) of each layer, in order."""
        numbers = zip(KINDS, (content.dense, content.moe), strict=True)
        return [(kind, self.held.chunk_slots(kind, chunk).start + i) for kind, n in numbers for i in range(n)]

    def _at(self, kind: str, slot: int, hand: Hand) -> tuple[Any, Weights, Hand]:
        """(layer, weights, hand with the layer's bias and given experts)"""
        bias_e, routes = None, None
        if kind == "moe_layers":
            number = jnp.asarray(self.held.layers[kind])[self.rank, slot]
            bias_e = self.gathered.bias_le[number]
            routes = None if hand.routes is None else hand.routes[number]
        return self.layers[kind], self._apart[kind][slot], hand._replace(bias_e=bias_e, routes=routes)

    def _onto(self, key: tuple[str, int], w: Weights, sums: Any) -> Weights:
        """The weights of a slot for `weights` of its layer, with sums of gradients to which that adds."""
        kind, slot = key
        read = (self.added[kind], w.params, sums[kind])
        return w._replace(params=jax.tree.map(lambda added, p, g: g[slot] if added else p, *read))

    # --- balance ----------------------------------------------------------------------------------------------------

    def _with_balance(self, part: Any, seq_loss: jax.Array, classic_loss: jax.Array) -> Any:
        """(scalar, metrics) of the objective on states of zeros, as a function of the balance losses alone."""
        h_btd = jnp.zeros(self.stream.shape, self.stream.dtype)
        mtp = jnp.zeros((self.cfg.num_nextn_predict_layers, *h_btd.shape), h_btd.dtype)
        aux = Aux(_NO_LOADS, seq_loss, classic_loss, mtp)
        return self.batch.objective(part, h_btd, head_weight(self._end), aux)

    def _rates_of(self, part: Any) -> tuple[Any, Any]:
        """Derivatives of (scalar, metrics) of the objective by a layer's sequence-wise and its classic loss."""
        zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
        seq, classic = (
            jax.jvp(lambda *s: self._with_balance(part, *s), (zero, zero), unit)[1]
            for unit in ((one, zero), (zero, one))
        )
        return seq, classic

    def _balance(self, part: Any, stats: Sequence[BalanceStats]) -> Scalars:
        """What balance losses of layers add to the metrics."""
        seq, classic = (sum(getattr(s, name) for s in stats) for name in ("seq_loss", "classic_loss"))
        (_, by_seq), (_, by_classic) = self._rates(part)
        return jax.tree.map(lambda a, b: a * seq + b * classic, by_seq, by_classic)

    def _balance_gradients(self, part: Any, scale: float) -> tuple[jax.Array, jax.Array]:
        """Of the objective, for each layer's (sequence-wise, classic) loss."""
        (by_seq, _), (by_classic, _) = self._rates(part)
        return by_seq * scale, by_classic * scale

    # --- order ------------------------------------------------------------------------------------------------------

    def then(self, tree: Any, done: Any) -> Any:
        """`tree`; on CPU devices, where an exchange may have further rounds, once all arrays of `done` are there: their
        collectives must meet no others (`exchange/order.py`)."""
        return after(tree, done) if getattr(self.layout.dispatcher, "receive", None) else tree

    # --- passes -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _metrics(self) -> Any:
        """Shapes of the objective's."""
        zero = jnp.zeros((), jnp.float32)
        return jax.eval_shape(lambda: self._with_balance(self.batch.part(jnp.int32(0)), zero, zero)[1])

    @property
    def nothing(self) -> Done:
        """Zeros."""
        cfg, metrics = self.cfg, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._metrics)
        slots = sum(self.held.slots["moe_layers"])
        counts = [
            jnp.zeros((n, cfg.n_routed_experts), jnp.int32) for n in (slots, cfg.num_nextn_predict_layers)
        ]
        return Done(metrics, *counts)

    def start(self, content: Content, part: Any, x_btd: jax.Array) -> jax.Array:
        """What the first layer reads: the stream of the stage before, or embeddings."""
        if not content.first:
            return x_btd
        tokens_bt = self.layout.sequence.own(self.batch.inputs(part).tokens_bt)
        return embed(self._end["embed"], self.cfg, tokens_bt)

    def forward(self, chunk: int, content: Content, index: jax.Array, x_btd: jax.Array) -> Any:
        """(stream, what the backward pass needs, `Done`)"""
        part = self.batch.part(index)
        hand, x_btd, kept, stats = self._hand(part), self.start(content, part, x_btd), [], {}
        for kind, slot in self._layers(chunk, content):
            run, w, at_hand = self._at(kind, slot, hand)
            x_btd, stats[kind, slot], of_layer = run.forward(w, at_hand, x_btd)
            kept.append(of_layer)
        return x_btd, (kept, x_btd if content.last else None), self._counted(part, stats)

    def _counted(self, part: Any, stats: dict[tuple[str, int], BalanceStats]) -> Done:
        done = self.nothing
        moe = {slot: s for (kind, slot), s in stats.items() if kind == "moe_layers"}
        if not moe:
            return done
        counts_se = done.counts_se
        for slot, s in moe.items():
            counts_se = counts_se.at[slot].add(s.counts_e)
        return Done(self._balance(part, list(moe.values())), counts_se, done.mtp_counts_ke)

    def backward(
        self, chunk: int, content: Content, index: jax.Array, kept: Any, g_btd: Any, scale: float
    ) -> Any:
        """(gradient of the stream, what `weights` needs, gradients of the end's parameters or None, `Done`)"""
        part = self.batch.part(index)
        (of_layers, end), hand = kept, self._hand(part)
        dp, done = None, self.nothing
        if content.last:
            g_btd, dp, done = self.end(part, end, scale)
        g_stats, cuts = self._balance_gradients(part, scale), []
        for (kind, slot), of_layer in reversed(
            list(zip(self._layers(chunk, content), of_layers, strict=True))
        ):
            run, w, at_hand = self._at(kind, slot, hand)
            g_btd, cut = run.backward(w, at_hand, Backward(of_layer, g_btd, g_stats))
            cuts.append(cut)
        return g_btd, (cuts, g_btd if content.first else None), dp, done

    def weights(self, chunk: int, content: Content, index: jax.Array, cuts: Any, sums: Any) -> dict[Any, Any]:
        """Gradients of the layers' parameters by (kind, slot), and under "embed" of the embedding; of those that are `added`,
        by kind a tree of bool, `sums` of all slots with them."""
        part = self.batch.part(index)
        (of_layers, g_btd), hand = cuts, self._hand(part)
        grads: dict[Any, Any] = {}
        dp = None
        for (kind, slot), cut in zip(reversed(self._layers(chunk, content)), of_layers, strict=True):
            run, w, at_hand = self._at(kind, slot, hand)
            w = self._onto((kind, slot), w, sums)
            dp = grads[kind, slot] = run.weights(w, at_hand, self.then(cut, dp))
        if content.first:
            grads["embed"] = self.of_embedding(part, g_btd)
        return grads

    def of_embedding(self, part: Any, g_btd: jax.Array) -> Any:
        tokens_bt = self.layout.sequence.own(self.batch.inputs(part).tokens_bt)
        return jax.vjp(lambda p: embed(p, self.cfg, tokens_bt), self._end["embed"])[1](g_btd)[0]

    def pair(self, forward: Any, backward: Any, scale: float, sums: Any) -> Any:
        """A forward (chunk, content, index, x) and a backward (chunk, content, index, kept, g), with weight gradients, of
        two micro-batches, layer beside layer -> results of `forward`, `backward` and `weights`, to which `sums` belong."""
        (chunk_f, content_f, index_f, x_btd), (chunk_b, content_b, index_b, kept, g_btd) = forward, backward
        part_f, part_b = self.batch.part(index_f), self.batch.part(index_b)
        hand_f, hand_b, (of_layers, end) = self._hand(part_f), self._hand(part_b), kept
        dp, done_b = None, self.nothing
        if content_b.last:
            g_btd, dp, done_b = self.end(part_b, end, scale)
        ahead = [(key, *self._at(*key, hand_f)) for key in self._layers(chunk_f, content_f)]
        back = []
        for key, of_layer in zip(self._layers(chunk_b, content_b), of_layers, strict=True):
            run, w, at_hand = self._at(*key, hand_b)
            back.append((key, run, self._onto(key, w, sums), at_hand, of_layer))
        g_stats = self._balance_gradients(part_b, scale)
        x_btd, g_btd, stats, kept_f, grads = in_pairs(
            ahead, self.start(content_f, part_f, x_btd), back[::-1], g_btd, g_stats, self.then
        )
        if content_b.first:
            grads["embed"] = self.of_embedding(part_b, g_btd)
        forward = (x_btd, (kept_f, x_btd if content_f.last else None), self._counted(part_f, stats))
        return forward, (g_btd, dp, done_b), grads

    # --- the end ----------------------------------------------------------------------------------------------------

    def _after(self, part: Any, p: Any, x_btd: jax.Array) -> Any:
        """(the objective's scalar, metrics, loads of the MTP modules)"""
        cfg, given = self.cfg, self.batch.inputs(part)
        p = attach(p, self._end_operands, self._policy)
        h_btd, mtp = final_norm(p, cfg, x_btd), None
        zero, e = jnp.zeros((), jnp.float32), cfg.n_routed_experts
        stats = BalanceStats(jnp.zeros((0, e), jnp.int32), zero, zero)
        if cfg.num_nextn_predict_layers:
            ctx, bias_ke = context(cfg, given, self.layout), self.gathered.bias_le[cfg.num_moe_layers :]
            mtp, stats = mtp_hidden(p, cfg, h_btd, given, bias_ke, ctx)
        aux = Aux(_NO_LOADS, stats.seq_loss.sum(), stats.classic_loss.sum(), mtp)
        return *self.batch.objective(part, h_btd, head_weight(p), aux), stats.counts_e

    def end(self, part: Any, x_btd: jax.Array, scale: float) -> tuple[jax.Array, Any, Done]:
        """(gradient of the stream, gradients of the end's parameters, `Done`)"""

        def scaled(p: Any, x_btd: jax.Array, part: Any) -> Any:
            scalar, metrics, counts_ke = self._after(part, p, x_btd)
            return scalar * scale, (metrics, counts_ke)

        if self._end_gradients is None:
            self._end_gradients = traced_once(jax.grad(scaled, (0, 1), has_aux=True))
        (dp, dx_btd), (metrics, counts_ke) = self._end_gradients(self._end, x_btd, part)
        return self.then(dx_btd, dp), dp, Done(metrics, self.nothing.counts_se, counts_ke)

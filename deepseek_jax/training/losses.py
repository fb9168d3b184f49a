"""Losses and gradients of one device's part of a batch (report sections 2.1.2, 2.2, 4.2).

Losses are divided by the *global* number of labels on each device, so that plain sums over devices give global means,
whatever the micro-batches and devices. Without segments a window has t labels, also of an MTP depth, whose last ones
are missing (equation 24). With segments, what counts of each depth is counted. No loss is summed over devices inside
what is differentiated: each differentiates its own part, and the collectives of experts and attention carry cotangents
to where they belong.

Dims: b sequence, t token, w window (t + 1 or more tokens), n flattened token, k MTP depth, l layer, e expert.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import BalanceConfig, Config
from deepseek_jax.model.layers import head_weight
from deepseek_jax.model.layout import Inputs, Layout
from deepseek_jax.model.loss import weighted_nll
from deepseek_jax.model.transformer import forward
from deepseek_jax.model.weights import attach
from deepseek_jax.precision import preset

Batch = Mapping[str, jax.Array]  # "tokens" int32 [b, w], and with packing masks "segments" and "positions"


class Losses(NamedTuple):
    """Means over the global batch, nats per token: main model, MTP (equation 25 without lambda), balance."""

    main: jax.Array
    mtp: jax.Array
    balance: jax.Array
    counts_le: jax.Array  # int32: tokens per MoE layer and expert


class Totals(NamedTuple):
    """Of a global batch, what its losses are divided by: sequences, and labels of the main model (depth 0) and of each
    MTP depth. room: tokens of the largest batch, which is static."""

    sequences: int | jax.Array
    labels: tuple[int | jax.Array, ...]
    room: int


def totals(
    cfg: Config, batch: Batch, sequences: int, micro_batches: jax.Array | None = None, axes: Any = ()
) -> Totals:
    """Totals of a global batch with room for `sequences`, of which `batch` are this device's rows.

    micro_batches: of the `grad_accumulation` ones that there is room for, the first so many are there; None: all.
    axes: the mesh axes that divide the global batch, inside `shard_map`.
    """
    t, depths, rows = cfg.data.seq_len, 1 + cfg.model.num_nextn_predict_layers, batch["tokens"].shape[0]
    room = sequences * t
    here: int | jax.Array = rows
    there: int | jax.Array = sequences
    if micro_batches is not None:
        here = micro_batches * (rows // cfg.train.grad_accumulation)
        # Float32: times t, an int32 would overflow from 2^31 tokens on.
        there = micro_batches.astype(jnp.float32) * (sequences // cfg.train.grad_accumulation)
    if "segments" not in batch:
        return Totals(there, (there * t,) * depths, room)
    present_b1 = jnp.arange(rows)[:, None] < here
    counts = jnp.stack([(targets(batch, t, depth)[1] & present_b1).sum() for depth in range(depths)])
    counts = lax.psum(counts, axes) if axes else counts
    return Totals(there, tuple(jnp.maximum(counts, 1).astype(jnp.float32)), room)


def inputs(batch: Batch, t: int) -> Inputs:
    """The first t tokens of a batch's windows, as the model reads them."""

    def cut(name: str) -> jax.Array | None:
        return batch[name][:, :t] if name in batch else None

    return Inputs(batch["tokens"][:, :t], cut("positions"), cut("segments"))


def targets(batch: Batch, t: int, depth: int) -> tuple[jax.Array, jax.Array]:
    """Labels [b, t] of depth 0 (main model) or k (MTP), and which of them count.

    Depth k predicts token i + k + 1 at position i. The last k positions of a window have no label within the window.
    With segments, a label of another document does not count.
    """
    tokens, b = batch["tokens"], batch["tokens"].shape[0]
    labels = jnp.roll(tokens[:, : t + 1], -(depth + 1), axis=1)[:, :t]
    valid = jnp.broadcast_to(jnp.arange(t) < t - depth, (b, t))
    if "segments" in batch:
        segments = batch["segments"][:, : t + 1]
        valid &= jnp.roll(segments, -(depth + 1), axis=1)[:, :t] == segments[:, :t]
    return labels, valid


def _balance_loss(balance: BalanceConfig, seq_loss: jax.Array, classic_loss: jax.Array) -> jax.Array:
    if balance.mode == "loss_free":
        return balance.seq_alpha * seq_loss
    if balance.mode == "classic":
        return balance.classic_alpha * classic_loss
    return jnp.zeros((), jnp.float32)


def losses(
    params: Any,
    cfg: Config,
    batch: Batch,
    balance_bias: jax.Array,
    total: Totals,
    layout: Layout,
) -> Losses:
    """This device's part of the losses: sums over its tokens divided by what the global batch has in `total`.

    Summed over devices and micro-batches they are the global means. `batch` holds whole sequences, of which a device
    takes its part if sequences are divided.
    """
    model, t = cfg.model, cfg.data.seq_len
    h_btd, aux = forward(params, model, inputs(batch, t), balance_bias, layout)
    w_dv = head_weight(params)

    def nll(h, depth):
        labels, valid = map(layout.sequence.own, targets(batch, t, depth))
        weights = valid.astype(jnp.float32).reshape(-1) / total.labels[depth]
        return weighted_nll(
            h.reshape(-1, h.shape[-1]), w_dv, labels.reshape(-1), weights, cfg.train.loss_chunk
        )

    depths = model.num_nextn_predict_layers
    mtp = jnp.zeros((), jnp.float32)
    for k in range(depths):
        assert aux.mtp is not None
        mtp = mtp + nll(aux.mtp[k], k + 1) / depths
    share = batch["tokens"].shape[0] / total.sequences
    balance = _balance_loss(cfg.balance, aux.seq_loss, aux.classic_loss) * share
    return Losses(nll(h_btd, 0), mtp, balance, aux.expert_counts_le)


def gradients(
    params: Any,
    quantised: Any,
    cfg: Config,
    batch: Batch,
    balance_bias: jax.Array,
    mtp_lambda: jax.Array,
    total: Totals,
    layout: Layout,
    micro_batches: int | jax.Array | None = None,
) -> tuple[Any, Losses]:
    """Float32 gradients and losses of this device's tokens, in `grad_accumulation` micro-batches.

    `micro_batches` (int32 []): only the first so many of them, so that one program serves batches of all sizes.

    Under an FP8 policy the weights' operands, `quantised` (`model.weights`), serve all micro-batches, and the
    backward pass runs on the losses times a power of two near the global token count: gradients of a mean over a large
    batch would lie below the quantiser's smallest scale, and vanish. Of parameters that come in the compute dtype, a
    micro-batch's gradient is rounded to it, as products are; sums are float32.
    """
    policy = preset(cfg.precision)
    scale = 1.0 if policy is None else 2.0 ** math.ceil(math.log2(total.room))

    def objective(params, micro):
        weights = attach(params, quantised, policy)
        parts = losses(weights, cfg, micro, balance_bias, total, layout)
        return (parts.main + mtp_lambda * parts.mtp + parts.balance) * scale, parts

    def grad(params, micro):
        grads, parts = jax.grad(objective, has_aux=True)(params, micro)
        return jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads), parts

    steps = cfg.train.grad_accumulation
    if steps == 1:
        return grad(params, batch)
    micro = {name: jnp.reshape(x, (steps, -1, *x.shape[1:])) for name, x in batch.items()}

    def body(i, so_far):
        part = {name: lax.dynamic_index_in_dim(x, i, keepdims=False) for name, x in micro.items()}
        return jax.tree.map(jnp.add, so_far, grad(params, part))

    shapes = jax.eval_shape(grad, params, {name: x[0] for name, x in micro.items()})
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.fori_loop(0, steps if micro_batches is None else micro_batches, body, zero)

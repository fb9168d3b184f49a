"""What training makes small: a function of what a forward pass computed (report sections 2.1.2, 2.2, 4.2).

    objective(outputs, batch, total, hyper) -> (scalar, metrics)

Both are this device's part, sums over its tokens divided by what the global batch has in `total`, so that they add up
over micro-batches and devices; metrics are float32 [] by name, among them "loss"; of those whose name ends in "_max" the
largest part is taken (`parallel/parts.py`). No loss is summed over devices inside
what is differentiated: each differentiates its own part, and the collectives of experts and attention carry cotangents
to where they belong.

Dims: b sequence, t token, d hidden, v vocabulary, k MTP depth.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.model.loss import weighted_nll
from deepseek_jax.model.sequence import Whole
from deepseek_jax.model.transformer import Aux
from deepseek_jax.training.labels import Batch, Totals, targets, with_tokens
from deepseek_jax.training.state import Hyper


class Outputs(NamedTuple):
    """What a forward pass gives to an objective: states of this device's tokens, after the final norm, and the head.

    sequence: where the tokens of a sequence are; `own` cuts an array of the batch [b, t] to this device's.
    """

    h_btd: jax.Array
    head_dv: jax.Array
    aux: Aux
    sequence: Whole


Scalars = dict[str, jax.Array]
# Over a pipeline (`pipelined.py`), whose ranks have parts of the model: balance losses enter linearly, with factors that
# no state changes; `aux.expert_counts_le` is None; and micro-batches that a ramp has no sequences for are there, all of
# them "padding".
Objective = Callable[[Outputs, Batch, Totals, Hyper], tuple[jax.Array, Scalars]]


def pretraining(cfg: Config) -> Objective:
    """Next token, plus lambda times the mean over the MTP depths (equation 25), plus the balance loss.

    Nats per label, over the labels that count: with a "loss_mask" in the batch it is that of supervised fine-tuning.
    Metrics: "loss" of the main model, "mtp_loss" where there are MTP modules, "balance_loss".
    """

    def objective(out: Outputs, batch: Batch, total: Totals, hyper: Hyper) -> tuple[jax.Array, Scalars]:
        main = _nll(cfg, out.h_btd, out.head_dv, 0, out.sequence, batch, total)
        beside, metrics = losses_beside(cfg, out, batch, total, hyper)
        return main + beside, {"loss": main, **metrics}

    return objective


def losses_beside(
    cfg: Config, out: Outputs, batch: Batch, total: Totals, hyper: Hyper
) -> tuple[jax.Array, Scalars]:
    """(sum of what is made small beside the main loss, metrics): MTP, where there are modules, and balance."""
    depths = cfg.model.num_nextn_predict_layers
    balance = _balance_loss(cfg, out.aux, batch, total)
    if not depths:
        return balance, {"balance_loss": balance}
    assert out.aux.mtp is not None
    head_dv = jax.lax.stop_gradient(out.head_dv) if cfg.train.detached_mtp else out.head_dv
    mtp = jnp.zeros((), jnp.float32)
    for k in range(depths):
        mtp = mtp + _nll(cfg, out.aux.mtp[k], head_dv, k + 1, out.sequence, batch, total) / depths
    return hyper.mtp_lambda * mtp + balance, {"mtp_loss": mtp, "balance_loss": balance}


def _nll(
    cfg: Config,
    h_btd: jax.Array,
    head_dv: jax.Array,
    depth: int,
    sequence: Whole,
    batch: Batch,
    total: Totals,
) -> jax.Array:
    """Negative log-likelihood of the labels of a depth, per label of the global batch."""
    labels, valid = map(sequence.own, targets(batch, cfg.data.seq_len, depth))
    weights = valid.astype(jnp.float32).reshape(-1) / total.labels[depth]
    h_nd = h_btd.reshape(-1, h_btd.shape[-1])
    return weighted_nll(h_nd, head_dv, labels.reshape(-1), weights, cfg.train.loss_chunk)


def _balance_loss(cfg: Config, aux: Aux, batch: Batch, total: Totals) -> jax.Array:
    """The sequence-wise loss is a mean over the sequences at hand, the classic one over their tokens."""
    rows = batch["tokens"].shape[0]
    if cfg.balance.mode == "loss_free":
        return cfg.balance.seq_alpha * aux.seq_loss * (rows / total.sequences)
    if cfg.balance.mode == "classic":
        there = with_tokens(batch, cfg.data.seq_len).sum() if "padding" in batch else rows
        return cfg.balance.classic_alpha * aux.classic_loss * (there / total.sequences)
    return jnp.zeros((), jnp.float32)

"""What training makes small: a function of what a forward pass computed (report sections 2.1.2, 2.2, 4.2).

    objective(outputs, batch, total, hyper) -> (scalar, metrics)

Both are this device's part, sums over its tokens divided by what the global batch has in `total`, so that they add up
over micro-batches and devices; metrics are float32 [] by name, among them "loss". No loss is summed over devices inside
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
    depths, t = cfg.model.num_nextn_predict_layers, cfg.data.seq_len

    def objective(out: Outputs, batch: Batch, total: Totals, hyper: Hyper) -> tuple[jax.Array, Scalars]:
        def nll(h_btd: jax.Array, depth: int) -> jax.Array:
            labels, valid = map(out.sequence.own, targets(batch, t, depth))
            weights = valid.astype(jnp.float32).reshape(-1) / total.labels[depth]
            h_nd = h_btd.reshape(-1, h_btd.shape[-1])
            return weighted_nll(h_nd, out.head_dv, labels.reshape(-1), weights, cfg.train.loss_chunk)

        main, mtp = nll(out.h_btd, 0), jnp.zeros((), jnp.float32)
        for k in range(depths):
            assert out.aux.mtp is not None
            mtp = mtp + nll(out.aux.mtp[k], k + 1) / depths
        balance = _balance_loss(cfg, out.aux, batch, total)
        metrics = {"loss": main, **({"mtp_loss": mtp} if depths else {}), "balance_loss": balance}
        return main + hyper.mtp_lambda * mtp + balance, metrics

    return objective


def _balance_loss(cfg: Config, aux: Aux, batch: Batch, total: Totals) -> jax.Array:
    """The sequence-wise loss is a mean over the sequences at hand, the classic one over their tokens."""
    rows = batch["tokens"].shape[0]
    if cfg.balance.mode == "loss_free":
        return cfg.balance.seq_alpha * aux.seq_loss * (rows / total.sequences)
    if cfg.balance.mode == "classic":
        there = with_tokens(batch, cfg.data.seq_len).sum() if "padding" in batch else rows
        return cfg.balance.classic_alpha * aux.classic_loss * (there / total.sequences)
    return jnp.zeros((), jnp.float32)

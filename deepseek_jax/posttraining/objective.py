"""What GRPO makes small over a batch of outputs: its loss, the MTP modules' and the balance loss.

A batch of labels (`training/labels.py`), one output in a row, with arrays [b, w] float32 in which the entry of a token stands in
the token's own column, and counts where "loss_mask" says that the token was drawn:

    "advantages"    [b] float32
    "old_logp"      log-probability before the updates of this rollout; without it, there was none
    "ref_logp"      that of the reference; needed unless beta is 0
    "sampler_logp"  that of the distribution really drawn from, where "old_logp" is another; for the off-policy mask
    "exact_logp"    that of the sampler with the present weights: the loss is that of these values, the gradient the model's
    "kept"          uint32 [b, w, words]: the ids that a token could be drawn from (`model/id_sets.py`)

The MTP modules learn the outputs on a detached trunk: their loss would move the policy.

Dims: b output, w window, t its tokens but the first, as labels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from deepseek_jax.checks import require
from deepseek_jax.config import Config
from deepseek_jax.model.loss import LogProbs, token_logprobs
from deepseek_jax.model.sequence import Whole
from deepseek_jax.posttraining.grpo_config import GRPOLossConfig
from deepseek_jax.posttraining.grpo_loss import Part, grpo_loss
from deepseek_jax.training.labels import Batch, Totals, targets
from deepseek_jax.training.objectives import Objective, Outputs, Scalars, losses_beside
from deepseek_jax.training.state import Hyper

ARRAYS = ("old_logp", "ref_logp", "sampler_logp", "exact_logp")


def grpo(
    cfg: Config, loss: GRPOLossConfig, temperature: float = 1.0, num_ids: int | None = None
) -> Objective:
    """The objective. temperature: at which the outputs were drawn, from the first num_ids ids (None: from all):
    log-probabilities are of that distribution.

    Metrics: those of `grpo_loss`; "entropy", nats, mean over the drawn tokens; those of `losses_beside`. Raises ValueError for a
    temperature of 0, and MTP modules that are not detached; when traced, for a batch that does not fit.
    """
    require(temperature > 0, f"temperature={temperature} must be > 0: greedy outputs have no probabilities")
    t, lambdas = cfg.data.seq_len, (cfg.optimizer.mtp_lambda, cfg.optimizer.mtp_lambda_final)
    require(
        cfg.train.detached_mtp or not cfg.model.num_nextn_predict_layers or not any(lambdas),
        "train.detached_mtp=False: the loss of the MTP modules would move the policy; set it to True",
    )

    def objective(out: Outputs, batch: Batch, total: Totals, hyper: Hyper) -> tuple[jax.Array, Scalars]:
        check(batch, loss)
        valid_bt = out.sequence.own(targets(batch, t, 0)[1])
        old, ref, sampler, exact = (of_labels(batch, name, t, out.sequence) for name in ARRAYS)
        logp_bt, entropy_bt = drawn_logprobs(
            out.sequence, out.head_dv, batch, out.h_btd, t, cfg.train.loss_chunk, temperature, num_ids
        )
        if exact is not None:
            logp_bt = exact + (logp_bt - stop_gradient(logp_bt))
        part = Part(total.answers, total.labels[0], out.sequence.total)
        scalar, metrics = grpo_loss(
            *(logp_bt, old, ref, batch["advantages"], valid_bt),
            sampler_logp=sampler,
            part=part,
            **dataclasses.asdict(loss),
        )
        beside, others = losses_beside(cfg, out, batch, total, hyper)
        entropy = jnp.where(valid_bt, entropy_bt, 0).sum() / total.labels[0]
        return scalar + beside, {**metrics, "entropy": entropy, **others}

    return objective


def of_labels(batch: Batch, name: str, t: int, sequence: Whole) -> Any:
    """An array of the batch for this device's labels: [b, w, ...] -> [b, t, ...]; None if it is not there."""
    return sequence.own(batch[name][:, 1 : t + 1]) if name in batch else None


def drawn_logprobs(
    sequence: Whole,
    head_dv: jax.Array,
    batch: Batch,
    h_btd: jax.Array,
    t: int,
    chunk: int,
    temperature: float,
    num_ids: int | None = None,
) -> LogProbs:
    """Log-probabilities and entropies [b, t] of this device's labels, in the distribution that they were drawn from: num_ids and
    up have no probability."""
    labels_bt, kept_btw = sequence.own(targets(batch, t, 0)[0]), of_labels(batch, "kept", t, sequence)
    kept_nw = None if kept_btw is None else kept_btw.reshape(-1, kept_btw.shape[-1])
    h_nd = h_btd.reshape(-1, h_btd.shape[-1])
    found = token_logprobs(h_nd, head_dv[:, :num_ids], labels_bt.reshape(-1), chunk, temperature, kept_nw)
    return LogProbs(*(x.reshape(labels_bt.shape) for x in found))


def check(batch: Batch, loss: GRPOLossConfig) -> None:
    """Raises ValueError for a batch that the objective cannot read."""
    shape = jnp.shape(batch["tokens"])
    needed = ["advantages", "loss_mask", *(["ref_logp"] if loss.beta else [])]
    missing = [name for name in needed if name not in batch]
    require(not missing, f"a batch for GRPO has no {missing}: it has {sorted(batch)}")
    sizes = {"advantages": shape[:1], **dict.fromkeys(ARRAYS, shape)}
    for name in sizes.keys() & batch.keys():
        x = batch[name]
        require(
            jnp.shape(x) == sizes[name] and jnp.issubdtype(x.dtype, jnp.floating),
            f"batch[{name!r}] is {x.dtype}{list(jnp.shape(x))}; it should be float32{list(sizes[name])}",
        )
    if (kept := batch.get("kept")) is not None:
        require(
            kept.ndim == 3 and jnp.shape(kept)[:2] == shape and kept.dtype == jnp.uint32,
            f'batch["kept"] is {kept.dtype}{list(jnp.shape(kept))}; it should be uint32{[*shape, "words"]}',
        )

"""The loss of Group Relative Policy Optimization (DeepSeek-V3 report section 5.2.2), as a function of arrays.

    loss = -mean of min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta KL(new || reference),  r = new / old

r and KL are of tokens, or of whole outputs (`grpo_config.py` names the forms). On policy r is 1 and the first term is minus
the mean advantage, which is near 0 for whole groups: the loss is then about beta KL, and says nothing of progress.

The arrays may be a part of a batch, a micro-batch or a device's tokens (`Part`): what comes back is this part's share, which
adds up.
Nothing is summed over devices inside what is differentiated. The ratio of an output is therefore written as a number times
each token's own part of its gradient (as GSPO-token, arXiv 2507.18071 equation 14), which is the same gradient.

Dims: b output, t token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from deepseek_jax.checks import require
from deepseek_jax.parallel.parts import MAX
from deepseek_jax.posttraining.grpo_config import GRPOLossConfig

Scalars = dict[str, jax.Array]
Total = Callable[[jax.Array], jax.Array]
# The options that are not named: nothing but the clipped ratio.
PLAIN = GRPOLossConfig(beta=0.0, kl="k3", off_policy_delta=0.0)


class Part(NamedTuple):
    """What the arrays are of a batch.

    outputs, tokens: how many the whole batch has, that count; None: as many as the mask. total: the sum over the devices that
    share an output.
    """

    outputs: Any = None
    tokens: Any = None
    total: Total = lambda x: x


def grpo_loss(
    logp: Any,
    old_logp: Any,
    ref_logp: Any,
    advantages: Any,
    mask: Any,
    *,
    sampler_logp: Any = None,
    part: Part = Part(),  # noqa: B008
    **options: Any,
) -> tuple[jax.Array, Scalars]:
    """(loss to be minimised, metrics), scalars of logp's dtype.

    Args:
        logp: log-probabilities (nats) of the sampled tokens now [b, t]: what is differentiated.
        old_logp: those before the updates of this rollout [b, t]; None: logp, without updates in between.
        ref_logp: of the reference [b, t]; None where beta is 0.
        advantages: [b].
        mask: bool [b, t], the tokens that were drawn, the end token included. An output without any is none.
        sampler_logp: of the distribution really drawn from [b, t], for off_policy_delta and importance; None: old_logp.
        part: of which batch these are.
        options: fields of `GRPOLossConfig`, as clip_low, clip_high, beta, kl, aggregate, constant_length, ratio,
            off_policy_delta, importance; those that are not given are PLAIN's.

    Metrics: "loss"; means over tokens: "kl" (k3, where there is a reference), "ratio", "ratio_distance" (from 1), "clip_share"
    (of tokens that the clip keeps from the gradient), "sampler_gap" (absolute difference from sampler_logp), "importance" (the
    weights, where asked for); "sampler_gap_max"; "dropped_share" (of outputs, by off_policy_delta).

    Raises ValueError for what `GRPOLossConfig` refuses, and a missing reference.
    """
    cfg = dataclasses.replace(PLAIN, **options)
    require(ref_logp is not None or cfg.beta == 0, f"beta={cfg.beta} weighs a KL divergence: give ref_logp")
    logp, mask = jnp.asarray(logp), jnp.asarray(mask, bool)
    old_logp = logp if old_logp is None else jnp.asarray(old_logp)
    sampler_logp = old_logp if sampler_logp is None else jnp.asarray(sampler_logp)
    a_b1 = jnp.asarray(advantages, logp.dtype)[:, None]
    there_bt, (outputs, tokens, total) = mask.astype(logp.dtype), part
    length_b1 = total(there_bt.sum(1, keepdims=True))
    outputs = (length_b1 > 0).sum().astype(logp.dtype) if outputs is None else outputs
    tokens = length_b1.sum() if tokens is None else tokens

    def log_ratio(of: Any, to: Any) -> jax.Array:
        """Of two log-probabilities, 0 where nothing was drawn: what stands there counts nowhere."""
        return jnp.where(mask, of - to, 0)

    def mean(x_bt: jax.Array) -> jax.Array:
        return stop_gradient((there_bt * x_bt).sum() / jnp.maximum(tokens, 1))

    # --- policy
    log_bt = log_ratio(logp, stop_gradient(old_logp))
    ratio_bt = jnp.exp(_of_actions(log_bt, cfg.ratio, length_b1, total))
    clipped_bt = jnp.clip(ratio_bt, 1 - cfg.clip_low, 1 + cfg.clip_high)
    gain_bt = jnp.minimum(ratio_bt * a_b1, clipped_bt * a_b1)
    gap_bt = stop_gradient(log_ratio(logp, sampler_logp))
    kept_b1 = _on_policy(a_b1, gap_bt, length_b1, cfg.off_policy_delta, total)
    weight_bt = _importance(stop_gradient(log_ratio(old_logp, sampler_logp)), cfg)
    loss_bt = -kept_b1 * weight_bt * gain_bt
    high_bt, low_bt = ratio_bt > 1 + cfg.clip_high, ratio_bt < 1 - cfg.clip_low
    outside_bt = (high_bt & (a_b1 > 0)) | (low_bt & (a_b1 < 0))
    metrics = {
        "ratio": mean(ratio_bt),
        "ratio_distance": mean(jnp.abs(ratio_bt - 1)),
        "clip_share": mean(outside_bt.astype(logp.dtype)),
        "sampler_gap": mean(jnp.abs(gap_bt)),
        f"sampler_gap{MAX}": jnp.abs(gap_bt).max(initial=0),
    }
    if cfg.off_policy_delta:
        dropped_bt = (1 - kept_b1) * there_bt / jnp.maximum(length_b1, 1)
        metrics["dropped_share"] = dropped_bt.sum() / jnp.maximum(outputs, 1)
    if cfg.importance != "none":
        metrics["importance"] = mean(weight_bt)

    # --- divergence from the reference
    if ref_logp is not None:
        # A sequence is one action of the report's form alone: GSPO's ratio is a mean, its actions remain tokens.
        level = "sequence" if cfg.ratio == "sequence" else "token"
        d_bt = _of_actions(log_ratio(stop_gradient(jnp.asarray(ref_logp)), logp), level, length_b1, total)
        kl_bt = jnp.expm1(d_bt) - d_bt
        metrics["kl"] = mean(kl_bt)
        if cfg.kl == "unbiased":
            kl_bt = kl_bt * jnp.exp(_of_actions(log_bt, level, length_b1, total))
        loss_bt = loss_bt + cfg.beta * kl_bt

    loss = (loss_bt * there_bt / _divisor(cfg, length_b1, outputs, tokens)).sum()
    return loss, {"loss": stop_gradient(loss), **metrics}


def _of_actions(log_bt: jax.Array, level: str, length_b1: jax.Array, total: Total) -> jax.Array:
    """Log-ratios of tokens -> of the actions that they are part of: tokens, or outputs (sum or mean)."""
    if level == "token":
        return log_bt
    sum_b1 = total(stop_gradient(log_bt).sum(1, keepdims=True))
    own_bt = log_bt - stop_gradient(log_bt)  # zeros, with a token's gradient
    if (
        level == "sequence"
    ):  # aggregated over an output's tokens, which all have its ratio, the gradient is a mean
        return sum_b1 + length_b1 * own_bt
    return sum_b1 / jnp.maximum(length_b1, 1) + own_bt


def _on_policy(
    a_b1: jax.Array, gap_bt: jax.Array, length_b1: jax.Array, delta: float, total: Total
) -> jax.Array:
    """0 for bad outputs that have become too unlikely since they were drawn, else 1: [b, 1]."""
    if not delta:
        return jnp.ones_like(a_b1)
    drift_b1 = total((-gap_bt).sum(1, keepdims=True)) / jnp.maximum(length_b1, 1)
    return 1 - ((a_b1 < 0) & (drift_b1 > delta)).astype(a_b1.dtype)


def _importance(log_bt: jax.Array, cfg: GRPOLossConfig) -> jax.Array:
    """Weights old / sampled of each token: of their sum over an output, the longer would weigh less."""
    if cfg.importance == "none":
        return jnp.ones_like(log_bt)
    weight_bt, bound = jnp.exp(log_bt), cfg.importance_bound
    return (
        jnp.minimum(weight_bt, bound) if cfg.importance == "truncated" else weight_bt * (weight_bt <= bound)
    )


def _divisor(cfg: GRPOLossConfig, length_b1: jax.Array, outputs: Any, tokens: Any) -> Any:
    """Of each token's loss."""
    if cfg.aggregate == "token":
        return jnp.maximum(tokens, 1)
    length = cfg.constant_length if cfg.aggregate == "constant" else jnp.maximum(length_b1, 1)
    return length * jnp.maximum(outputs, 1)

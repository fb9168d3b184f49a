"""`advice` says in words what is wrong with a run, and which key of the config to change.

Dims: l MoE layer (MTP modules last), e routed expert.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config import Config

RECENT = 50  # training records that say how the run is now
_ENOUGH_TOKENS = 100  # per expert: with fewer, an expert may get none by chance
_FULL = 0.95  # share of the largest possible MaxVio
_RISE = 0.01  # share of the validation loss; a smaller rise is noise
_TRAINING_RISE = 0.05
_WAITING = 0.2  # share of the time that is too much


class Advice(NamedTuple):
    """about: the subject, one fixed word for each check; text: one sentence."""

    about: str
    text: str


class History:
    """The part of a run's records that advice needs: losses by step, and the last records."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()):
        self.losses: list[tuple[int, float]] = []  # training losses by step
        self.validation: list[tuple[int, float]] = []
        self.recent: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=RECENT)
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """The next record, as `metrics.read_records` gives it or as it is written."""
        if record["kind"] == "train":
            self.recent.append(record)
        curve = {"train": self.losses, "eval": self.validation}.get(record["kind"])
        if curve is not None and record.get("loss") is not None and np.isfinite(record["loss"]):
            curve.append((record["step"], float(record["loss"])))


def advice(cfg: Config, history: History, unigram_loss: float | None = None) -> list[Advice]:
    """What is wrong, the most serious first; empty for a healthy run.

    Args:
        cfg: the run's.
        history: of its records.
        unigram_loss: nats per token of a unigram model on the validation tokens.
    """
    found = {
        "skipped steps": _skipped(cfg, history),
        "training loss": _training_rises(cfg, history),
        "unigram": _no_better_than_unigram(cfg, history, unigram_loss),
        "validation": _validation_rises(cfg, history),
        "MaxVio": _collapsed(cfg, history),
        "idle experts": _idle_experts(cfg, history),
        "data": _waits_for_data(cfg, history),
    }
    return [Advice(about, text) for about, text in found.items() if text is not None]


def _slower(cfg: Config) -> str:
    peak, warmup = cfg.optimizer.peak_lr, cfg.optimizer.warmup_steps
    return f"lower optimizer.peak_lr ({peak:g}) or raise optimizer.warmup_steps ({warmup})"


def _skipped(cfg: Config, history: History) -> str | None:
    skipped = history.recent[-1].get("skipped", 0) if history.recent else 0
    if not skipped:
        return None
    return f"{skipped} step(s) skipped, because loss or gradient were not finite: {_slower(cfg)}"


def _training_rises(cfg: Config, history: History) -> str | None:
    losses = np.array([loss for _, loss in history.losses])
    if len(losses) < 2 * RECENT:
        return None
    means = np.convolve(losses, np.full(RECENT, 1 / RECENT), "valid")
    best = int(means.argmin())
    if means[-1] <= means[best] * (1 + _TRAINING_RISE):
        return None
    step = history.losses[best + RECENT - 1][0]
    return f"training loss rose from {means[best]:.3f} at step {step} to {means[-1]:.3f}: {_slower(cfg)}"


def _no_better_than_unigram(cfg: Config, history: History, unigram_loss: float | None) -> str | None:
    if unigram_loss is None or not history.validation:
        return None
    step, loss = history.validation[-1]
    if loss < unigram_loss or step < cfg.train.steps / 2:
        return None
    return (
        f"validation loss {loss:.3f} is no better than a unigram model's {unigram_loss:.3f}, which sees no context: "
        f"raise train.steps ({cfg.train.steps}) or optimizer.peak_lr ({cfg.optimizer.peak_lr:g})"
    )


def _validation_rises(cfg: Config, history: History) -> str | None:
    if not history.validation:
        return None
    best_step, best = min(history.validation, key=lambda x: x[1])
    step, loss = history.validation[-1]
    if loss <= best * (1 + _RISE):
        return None
    then = [x for at, x in history.losses if at <= best_step][-RECENT:]
    now = [x for _, x in history.losses][-RECENT:]
    by_heart = bool(then) and np.mean(now) < np.mean(then)
    cure = (
        f"training loss still falls, so the model learns its texts by heart: give more text (data.source), lower "
        f"train.steps ({cfg.train.steps}) to {best_step}, or raise optimizer.weight_decay "
        f"({cfg.optimizer.weight_decay:g})"
        if by_heart
        else f"lower optimizer.peak_lr ({cfg.optimizer.peak_lr:g})"
    )
    return f"validation loss rose from {best:.3f} at step {best_step} to {loss:.3f} at step {step}: {cure}"


# --- experts ------------------------------------------------------------------------------------------------


def _balance_key(cfg: Config) -> str:
    """Names the key that spreads tokens over experts, with its value."""
    if cfg.balance.mode == "none":
        return "set balance.mode=loss_free (none)"
    if cfg.balance.mode == "classic":
        return f"raise balance.classic_alpha ({cfg.balance.classic_alpha:g})"
    if not cfg.model.has_balance_bias:
        return f"raise balance.seq_alpha ({cfg.balance.seq_alpha:g})"
    return f"raise optimizer.gamma ({cfg.optimizer.gamma:g})"


def layer_names(cfg: Config) -> list[str]:
    """Names of the MoE layers, which the model counts from 0: "3", "4", ..., "MTP 1"."""
    model = cfg.model
    layers = [str(i) for i in range(model.first_k_dense_replace, model.num_hidden_layers)]
    return layers + [f"MTP {i + 1}" for i in range(model.num_nextn_predict_layers)]


def _several(names: Sequence[str], separator: str = ", ", at_most: int = 4) -> str:
    return separator.join([*names[:at_most], *(["..."] if len(names) > at_most else [])])


def _collapsed(cfg: Config, history: History) -> str | None:
    recent = [
        r for r in history.recent if r["step"] > history.recent[-1]["step"] / 2
    ]  # not how a short run began
    found = [r["max_vio"] for r in recent if np.size(r.get("max_vio", ()))]
    if not found:  # a dense model
        return None
    most = cfg.model.n_routed_experts / cfg.model.num_experts_per_tok - 1
    if most <= 0:
        return None
    mean_l = np.mean(np.array(found, np.float64), axis=0)
    full = [name for name, x in zip(layer_names(cfg), mean_l, strict=True) if x >= _FULL * most]
    if not full:
        return None
    return (
        f"MaxVio is at its maximum of {most:.2f} in layer {_several(full)}: the same {cfg.model.num_experts_per_tok} "
        f"experts get every token: {_balance_key(cfg)} and lower optimizer.peak_lr "
        f"({cfg.optimizer.peak_lr:g})"
    )


def _idle_experts(cfg: Config, history: History) -> str | None:
    having = [r for r in history.recent if np.size(r.get("expert_counts", ()))]
    as_it_was = cfg.train.init_from and not cfg.optimizer.gamma  # a bias that stays, on text of few kinds
    if not having or as_it_was:
        return None
    counts_le = np.sum([np.asarray(r["expert_counts"], np.int64) for r in having], axis=0)
    idle_le = (counts_le == 0) & (counts_le.mean(-1, keepdims=True) >= _ENOUGH_TOKENS)
    if not idle_le.any():
        return None
    where = [
        f"layer {name}: {_several([str(e) for e in np.flatnonzero(idle_e)])}"
        for name, idle_e in zip(layer_names(cfg), idle_le, strict=True)
        if idle_e.any()
    ]
    return (
        f"{idle_le.sum()} of {idle_le.size} experts got no token in steps {having[0]['step']} to "
        f"{having[-1]['step']} ({_several(where, '; ')}): {_balance_key(cfg)}"
    )


def _waits_for_data(cfg: Config, history: History) -> str | None:
    timed = [r for r in history.recent if r.get("step_seconds") is not None]
    total = sum(r["step_seconds"] for r in timed)
    share = sum(r["data_seconds"] for r in timed) / total if total else 0.0
    if share <= _WAITING:
        return None
    rates = [name for name in ("fim_rate", "split_punctuation_rate") if getattr(cfg.data, name) > 0]
    lower = "".join(f", or lower data.{name} ({getattr(cfg.data, name):g})" for name in rates)
    return (
        f"{share:.0%} of the time goes by waiting for data: put data.cache_dir ({cfg.data.cache_dir}) on a faster "
        f"disk{lower}"
    )

"""Sampled groups become batches: what the training step reads of a rollout.

A row is a prompt and one answer, from column 0 on, padded behind. An entry of a token stands in the token's own column, as
labels do (`training/labels.py`).

Dims: b row, w column (window and one), t token of an answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.data.prompts import Prompt
from deepseek_jax.parallel.mesh import batch_sharding
from deepseek_jax.parallel.processes.together import of_each
from deepseek_jax.posttraining.advantages import group_advantages, silent
from deepseek_jax.posttraining.grpo_config import GRPOLossConfig
from deepseek_jax.posttraining.grpo_settings import GRPOConfig
from deepseek_jax.posttraining.rewards import Scores
from deepseek_jax.posttraining.rollouts import Sample

Rows = dict[str, np.ndarray]


class Group(NamedTuple):
    """The answers to one prompt.

    texts: of the answers, without the end token. rewards: float64 [n]. parts: of each reward by its name, NaN where it does
    not apply.
    """

    prompt: Prompt
    samples: Sequence[Sample]
    texts: Sequence[str]
    rewards: np.ndarray
    parts: Mapping[str, np.ndarray]

    @property
    def silent(self) -> bool:
        """Whether all answers are worth the same, so that none is better than another."""
        return bool(silent(self.rewards))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return len(self.prompt.ids) + max(len(sample.tokens) for sample in self.samples)


def grouped(
    prompts: Sequence[Prompt], samples: Sequence[Sample], texts: Sequence[str], scores: Scores
) -> list[Group]:
    """The answers to each prompt, of which there are equally many."""
    groups, n = [], len(samples) // len(prompts)
    for at, prompt in enumerate(prompts):
        own = slice(at * n, (at + 1) * n)
        parts = {name: x[own] for name, x in scores.parts.items()}
        groups.append(Group(prompt, samples[own], texts[own], scores.total[own], parts))
    return groups


def windows(seq_len: int, buckets: int) -> list[int]:
    """Tokens of the windows for which there are programs: seq_len, seq_len / 2, ..., `buckets` of them, the smallest first."""
    return sorted({max(1, seq_len >> i) for i in range(buckets)})


def width_for(tokens: int, seq_len: int, buckets: int) -> int:
    """Columns of a batch whose longest row has so many tokens: one and the smallest window that it fits into."""
    fitting = (window for window in windows(seq_len, buckets) if tokens <= window + 1)
    return 1 + next(fitting, seq_len)


def rows_of(groups: Sequence[Group], loss: GRPOLossConfig, width: int) -> Rows:
    """ "tokens", "loss_mask", "padding", "sampler_logp" [b, width], "advantages" [b], and "kept" [b, width, words], "routes"
    [b, width, l, k] where the samples have them."""
    pairs = [(group, sample) for group in groups for sample in group.samples]
    shape = (len(pairs), width)
    rows: Rows = {
        "tokens": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, bool),
        "padding": np.ones(shape, bool),
        "sampler_logp": np.zeros(shape, np.float32),
        "advantages": np.concatenate([_advantages(group, loss) for group in groups]).astype(np.float32),
    }
    first = pairs[0][1]
    if first.kept is not None:
        rows["kept"] = np.zeros((*shape, first.kept.shape[-1]), np.uint32)
    if first.routes is not None:
        rows["routes"] = np.full((*shape, *first.routes.shape[1:]), -1, first.routes.dtype)
    for i, (group, sample) in enumerate(pairs):
        begin, end = len(group.prompt.ids), len(group.prompt.ids) + len(sample.tokens)
        rows["tokens"][i, :end] = [*group.prompt.ids, *sample.tokens]
        rows["padding"][i, :end] = False
        rows["loss_mask"][i, begin:end] = _teaches(group, sample, loss)
        rows["sampler_logp"][i, begin:end] = sample.logprobs
        if sample.kept is not None:
            rows["kept"][i, begin:end] = sample.kept
        if sample.routes is not None:
            rows["routes"][i, : end - 1] = sample.routes
    return rows


def abstract_rows(cfg: GRPOConfig, mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Of `rows_of` in the widest window, with the log-probabilities that a step reads."""
    b, w, model = cfg.train.batch_size, cfg.data.seq_len + 1, cfg.model
    sampling = cfg.rollouts.sampling(())
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        name: ((b, w), np.int32 if name == "tokens" else bool) for name in ("tokens", "loss_mask", "padding")
    }
    arrays |= {name: ((b, w), np.float32) for name in ("sampler_logp", *cfg.logprobs)} | {
        "advantages": ((b,), np.float32)
    }
    if sampling.kept:
        arrays["kept"] = ((b, w, -(-model.vocab_size // 32)), np.uint32)
    if sampling.routes:
        arrays["routes"] = ((b, w, model.num_moe_layers, model.num_experts_per_tok), np.int16)
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(*x, sharding=sharding) for name, x in arrays.items()}


def _advantages(group: Group, loss: GRPOLossConfig) -> np.ndarray:
    return group_advantages(group.rewards[None], loss.scale)[0]


def _teaches(group: Group, sample: Sample, loss: GRPOLossConfig) -> bool:
    """Whether something is learned from this answer."""
    cut_off = loss.mask_truncated and sample.finish_reason == "length"
    return not cut_off and not (loss.drop_silent and group.silent)


# --- what a rollout was like ------------------------------------------------------------------------------------------


def summary(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Sums over groups, which add up over processes: name -> [sum, number of what it is a sum of], float64."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = np.concatenate([group.rewards for group in groups])
    lengths = np.array([len(sample.tokens) for sample in samples])
    spreads = np.array([np.nanstd(group.rewards) for group in groups])
    found = {
        "reward": rewards,
        "reward_std": spreads,
        "silent_groups": np.array([group.silent for group in groups]),
        "answer_tokens": lengths,
        "cut_off": np.array([sample.finish_reason == "length" for sample in samples]),
    }
    for name in groups[0].parts:
        found[f"reward_{name}"] = np.concatenate([group.parts[name] for group in groups])
    return {name: np.array([np.nansum(x), (~np.isnan(x.astype(float))).sum()]) for name, x in found.items()}


def over_processes(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of `summary`, added up; all processes call it."""
    return dict(zip(sums, of_each(np.stack(list(sums.values()))).sum(0), strict=True))


def means(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of `summary`; a reward that applied nowhere is left out."""
    return {name: float(total / count) for name, (total, count) in sums.items() if count}


class Silence:
    """Notices rollouts in which all answers to each prompt are worth the same, so that nothing is learned."""

    IN_A_ROW = 3

    def __init__(self) -> None:
        self._rollouts = 0

    def __call__(self, rollout: Mapping[str, float], max_tokens: int) -> str | None:
        """What to say after a rollout with these `means`; None for most of them."""
        self._rollouts = self._rollouts + 1 if rollout["silent_groups"] == 1 else 0
        if self._rollouts != self.IN_A_ROW:
            return None
        return (
            f"warning: in {self.IN_A_ROW} rollouts in a row all answers to each question were worth the same, {rollout['reward']:.3g} in "
            f"the mean, and {rollout['cut_off']:.0%} of them were cut off at rollouts.max_tokens={max_tokens}: nothing is learned so. "
            "Fine-tune on such questions first, ask easier or harder ones, or let answers be longer"
        )


def ends(groups: Sequence[Group], shown: int) -> dict[str, str]:
    """Answers with the largest and with the smallest rewards, as texts by "best_1", ..., "worst_1", ...; no prompt twice at one
    end."""
    found = {}
    for name, pick, order in (("best", np.argmax, -1), ("worst", np.argmin, 1)):
        chosen = sorted(
            ((float(group.rewards[pick(group.rewards)]), at) for at, group in enumerate(groups)),
            key=lambda one: order * one[0],
        )
        for i, (reward, at) in enumerate(chosen[:shown], 1):
            group = groups[at]
            question, answer = _question(group.prompt), group.texts[int(pick(group.rewards))]
            found[f"{name}_{i}"] = f"{question}\n>> {answer}\n(reward {reward:.3g})"
    return found


def _question(prompt: Prompt) -> str:
    said = prompt.prompt
    return said if isinstance(said, str) else "\n".join(str(message.get("content", "")) for message in said)

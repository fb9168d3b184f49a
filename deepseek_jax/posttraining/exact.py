"""Log-probabilities of sampled tokens for the trainer in the very bits of the sampler.

Trainer and sampler run one model in two forms: whole sequences with keys and values expanded, or a few tokens over pages of
latents, absorbed, in other shapes of products. Both give a token's log-probability to some 1e-6 in float32, never the same bits;
in FP8, and where an expert is chosen by a hair, they differ by more. In the exact mode the trainer takes its values from the
sampler's form: the tokens go through the engine once more, each taken instead of drawn (`Request.answer`), in the programs that
drew them. With the same weights these are the bits of `Sample.logprobs`, so that the first update of a rollout has ratios of 1,
exactly; with later weights they are what the sampler would say now. Gradients are those of the trainer's own pass
(`objective.py`, "exact_logp").

That holds for an engine whose rows do not depend on what runs beside them (`Options.invariant`).
"""

from collections.abc import Sequence

import numpy as np

from deepseek_jax.checks import require
from deepseek_jax.posttraining.rollouts import Sample, Sampling
from deepseek_jax.serving import sampling as serving
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.request import Request, Update


class Recorded:
    """A grammar that allows, token by token, the ids that each was drawn from (`Sample.kept`)."""

    error: str | None = None

    def __init__(self, kept_tw: np.ndarray):
        self._kept_tw, self._at = kept_tw, 0

    def mask(self) -> np.ndarray:
        # Behind the end, everything: nothing is drawn there that counts.
        return self._kept_tw[min(self._at, len(self._kept_tw) - 1)]

    def accept(self, token: int) -> bool:
        self._at += 1
        return True

    def rollback(self, tokens: int) -> None:
        self._at -= tokens


def exact_logprobs(
    engine: Engine, prompts: Sequence[Sequence[int]], samples: Sequence[Sample], sampling: Sampling
) -> list[np.ndarray]:
    """Of each sample's tokens, float32 [t], nats, by the weights that the engine has: in the distribution that they were drawn
    from, which is that of all ids that `Sample.kept` names, or of all ids, at `sampling.temperature`.

    prompts: those that `Sample.prompt` counts. Raises ValueError for an engine whose bits depend on what runs beside a row, or
    whose MTP module drafts; for greedy samples, which have no probabilities; for those of a nucleus that was not kept; and, with
    other weights than those that drew them, for samples with routes: the engine chooses experts by the weights that it has.
    """
    require(
        engine.options.invariant and not engine.device.drafts,
        f"exact log-probabilities need an engine with invariant=True and drafts=False, not invariant={engine.options.invariant}, "
        f"drafts={engine.options.drafts}",
    )
    cut = sampling.top_p < 1 or sampling.top_k > 0
    require(sampling.temperature > 0, "temperature=0: greedy samples have no probabilities; set it above 0")
    require(
        not cut or all(sample.kept is not None for sample in samples),
        f"top_p={sampling.top_p}, top_k={sampling.top_k}: other weights leave other ids; sample with kept=True",
    )
    other = {sample.version for sample in samples if sample.routes is not None} - {engine.version}
    require(
        not other,
        f"samples of the weights {sorted(other)} were routed by them, and the engine routes by its own, {engine.version}: leave their "
        "routes out, here and in training",
    )
    requests = [_again(str(i), prompts[s.prompt], s, sampling) for i, s in enumerate(samples)]
    found: dict[str, list[float]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for update in engine.step():
            _check(update)
            found[update.id] += [token.sampled_logprob for token in update.tokens]
    return [np.array(logprobs, np.float32) for logprobs in found.values()]


def _again(name: str, prompt: Sequence[int], sample: Sample, sampling: Sampling) -> Request:
    tokens = sample.tokens.tolist()
    grammar = None if sample.kept is None else Recorded(sample.kept)
    at = serving.Sampling(sampling.temperature)
    return Request(name, prompt, len(tokens), at, answer=tokens, grammar=grammar)


def _check(update: Update) -> None:
    require(update.error is None, f"sample {update.id}: {update.error}")

"""What GRPO and distillation need of a generator, whoever generates: samples of prompts, and other weights from time to time.

A sample depends on the weights, its prompt, `Sampling` and its own key alone: not on what is sampled beside it, nor on how
many devices or processes share the prompts. The key of sample i of a prompt is made of the prompt's seed and i.

Dims: t token of an answer, s token of prompt and answer, w word of 32 ids, l MoE layer, k expert of a token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from deepseek_jax.checks import is_integer, require, shown

GOLDEN = (
    0x9E3779B9  # between the keys of a prompt's samples: 2^32 over the golden ratio, odd, so that they differ
)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_tokens: of an answer, the end token included.
        stop_ids: each ends an answer, and is its last token.
        temperature, top_p, top_k: as in `serving.sampling.Sampling`; temperature 0 is greedy.
        kept: give the ids that each token was drawn from.
        routes: give the experts that each token went to.
    """

    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    kept: bool = False
    routes: bool = False


class Sample(NamedTuple):
    """One answer.

    Attributes:
        prompt: which of the prompts it answers, counted from 0.
        tokens: int32 [t]; a stop id that ended it is the last: it was drawn as the others were.
        logprobs: float32 [t], nats, of each token in the distribution that it was drawn from: after temperature, top-p and
            top-k; 0 where that is greedy.
        finish_reason: "stop" (a stop id) or "length" (`Sampling.max_tokens`).
        version: of the oldest weights that drew one of its tokens.
        routes: int16 [s - 1, l, k], the experts that the tokens of prompt and answer went to, but the last one, which went
            through no layer; None where not asked for.
        kept: uint32 [t, w], for each token the ids that could be drawn, bit i % 32 of word i // 32; None where not asked for.
    """

    prompt: int
    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    version: int
    routes: np.ndarray | None = None
    kept: np.ndarray | None = None


class Rollouts(Protocol):
    """A generator."""

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Sample]:
        """n samples of each prompt: those of the first, in their order, then those of the next.

        Args:
            prompts: token ids of each, at least one token.
            seed: one, from which each prompt has its own by its place; or one for each prompt.

        Raises ValueError for what cannot be sampled.
        """
        ...

    def load(self, params: Any, version: int) -> None:
        """Samples from now on with other weights, a `TrainState`'s or the like: whatever this generator was built for."""
        ...

    def close(self) -> None:
        """Ends what goes on beside."""
        ...


def seed_of(*numbers: int) -> int:
    """A seed in [0, 2^32) that is a function of all these numbers, each >= 0, and of their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seeds_of_prompts(seed: int | Sequence[int], prompts: int) -> list[int]:
    """One for each prompt. Raises ValueError for another number of seeds."""
    if not isinstance(seed, Sequence):
        require(is_integer(seed), f"seed={shown(seed)} must be an integer, or one for each prompt")
        return [seed_of(int(seed), i) for i in range(prompts)]
    require(all(map(is_integer, seed)), f"seed={shown(seed)} must be an integer, or one for each prompt")
    require(len(seed) == prompts, f"{len(seed)} seeds for {prompts} prompts: give one, or one for each")
    return [int(one) for one in seed]


def seed_of_sample(seed: int, sample: int) -> int:
    """Of a prompt's sample: no two of a prompt are alike."""
    return (seed + sample * GOLDEN) % 2**32

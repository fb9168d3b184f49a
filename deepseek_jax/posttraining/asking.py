"""`Ask`: conversations in, what a model says next out. All that judges need of a model.

Each answer is drawn with a seed made of the conversation and of how often it was asked before in the same call. So a
judgement does not depend on what is judged beside it, and is the same when a run that was killed asks again.
"""

import collections
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from deepseek_jax.posttraining.rewards import texts
from deepseek_jax.posttraining.rollouts import Rollouts, Sample, Sampling, seed_of

Conversation = Sequence[Mapping[str, Any]]
_END = 16  # tokens of a prompt, in which the mark that opens reasoning lies, if it is its end


class Ask(Protocol):
    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        """What the model says next in each. The same conversation several times: several draws."""
        ...


class AskRollouts:
    """Asks the model behind a `Rollouts`: another one than the policy, or, for rewards by itself, the policy.

    Control tokens that a text of a conversation spells out stay text: what is judged may not close its own turn.

    Args:
        tokenizer: with a chat template.
        positions: tokens of a conversation and its answer, at most. A longer one gets no answer (""), which no judge can read
            a verdict in, instead of ending a run.
    """

    def __init__(self, rollouts: Rollouts, tokenizer: Any, sampling: Sampling, positions: int, seed: int = 0):
        self._rollouts, self._tokenizer, self._sampling = rollouts, tokenizer, sampling
        self._room, self._seed = positions - sampling.max_tokens, seed
        names = sorted((tokenizer.token(i) for i in tokenizer.control_ids), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, filter(None, names))) or "(?!)")

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        prompts = [self._tokenizer.encode_chat(list(map(self._plain, said))) for said in conversations]
        asked = [i for i, prompt in enumerate(prompts) if len(prompt) <= self._room]
        answers = [""] * len(prompts)
        if asked:
            seeds = self._seeds(prompts)
            samples = self._rollouts.sample(
                [prompts[i] for i in asked], 1, self._sampling, [seeds[i] for i in asked]
            )
            for i, sample in zip(asked, samples, strict=True):
                answers[i] = text_of(sample, self._tokenizer, self._sampling)
        return answers

    def _plain(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with a space inside each control token that it spells out."""
        apart = self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", message["content"])
        return {**message, "content": apart}

    def _seeds(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        times: collections.Counter[tuple[int, ...]] = collections.Counter()
        seeds = []
        for prompt in map(tuple, prompts):
            seeds.append(seed_of(self._seed, zlib.crc32(repr(prompt).encode()), times[prompt]))
            times[prompt] += 1
        return seeds


def text_of(sample: Any, tokenizer: Any, sampling: Sampling) -> str:
    """The text of a `rollouts.Sample`, without the id that ended it."""
    tokens = sample.tokens.tolist()
    return tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in sampling.stop_ids else tokens)


def for_rewards(
    prompts: Sequence[Sequence[int]], samples: Sequence[Sample], said: Sequence[str], tokenizer: Any
) -> list[str]:
    """The texts of samples as rewards read them: with the mark of the reasoning that a prompt has opened."""
    ends = tokenizer.decode_batch([list(map(int, ids[-_END:])) for ids in prompts])
    return [texts.behind(ends[sample.prompt], text) for sample, text in zip(samples, said, strict=True)]

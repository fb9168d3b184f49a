"""An author answers problems, and rewards say what its answers are worth."""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.checks import require, shown
from deepseek_jax.data.row_fields import options_of
from deepseek_jax.posttraining.asking import for_rewards, text_of
from deepseek_jax.posttraining.author import Author
from deepseek_jax.posttraining.drawn import Line
from deepseek_jax.posttraining.rewards import Rewards, columns_of, rewards_named
from deepseek_jax.posttraining.rollouts import Sampling, seed_of
from deepseek_jax.posttraining.selection import Answer

Problem = Mapping[str, Any]
_ROUNDING = 1e-9  # of sums of rewards


def answered(
    author: Author,
    problems: Sequence[Problem],
    n: int,
    sampling: Sampling,
    rewards: Rewards,
    seed: int = 0,
    system: str = "",
    first: int = 0,
) -> list[Line]:
    """n answers to each problem, scored: lines of `drawn.py`.

    Args:
        problems: rows with "prompt" (messages), "tools" and "chat_template_kwargs" if there are any, and the columns that the
            rewards read.
        system: stands before each prompt.
        first: the number of the first problem; answers depend on a problem's number, not on those beside it.

    Raises ValueError for a prompt that leaves no room for an answer.
    """
    prompts = [_ids(author, problem, system, sampling) for problem in problems]
    seeds = [seed_of(seed, first + i) for i in range(len(problems))]
    samples = author.rollouts.sample(prompts, n, sampling, seeds)
    texts = [text_of(sample, author.tokenizer, sampling) for sample in samples]
    rows = [problems[sample.prompt] for sample in samples]
    ids = [sample.tokens.tolist() for sample in samples]
    columns = columns_of(rows)
    read = for_rewards(prompts, samples, texts, author.tokenizer)
    scores = rewards([row["prompt"] for row in rows], read, ids, **columns)
    return [
        {
            "problem": first + sample.prompt,
            "sample": i % n,
            "text": texts[i],
            "tokens": len(sample.tokens),
            "finish_reason": sample.finish_reason,
            "reward": float(scores.total[i]),
        }
        for i, sample in enumerate(samples)
    ]


def as_asked(system: str, problem: Problem) -> list[dict[str, Any]]:
    """The messages of a problem, after a system prompt if there is one."""
    messages = problem["prompt"]
    require(isinstance(messages, list), f"prompt={shown(messages)} should be a list of messages")
    return [{"role": "system", "content": system}, *messages] if system else list(messages)


def _ids(author: Author, problem: Problem, system: str, sampling: Sampling) -> list[int]:
    messages, options = as_asked(system, problem), options_of(problem, author.tokenizer.chat_template)
    ids = author.tokenizer.encode_chat(messages, **options)
    require(
        len(ids) + sampling.max_tokens <= author.positions,
        f"the prompt {shown(problem['prompt'][-1]['content'])} has {len(ids)} tokens: with max_tokens="
        f"{sampling.max_tokens} that exceeds the model's {author.positions} positions",
    )
    return ids


def answer_of(line: Line, right: float) -> Answer:
    """right: the smallest reward of an answer that is right."""
    is_right = line["reward"] >= right - _ROUNDING
    return Answer(line["problem"], line["text"], line["tokens"], line["finish_reason"], is_right)


def right_or_wrong(
    author: Author,
    problems: Sequence[Problem],
    n: int,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
) -> list[Answer]:
    """n answers to each problem, by its "answer": what a model can do, in one call."""
    sampling = Sampling(max_tokens, tuple(author.tokenizer.stop_ids), temperature)
    lines = answered(author, problems, n, sampling, rewards_named(("answer",)), seed)
    return [answer_of(line, 1.0) for line in lines]

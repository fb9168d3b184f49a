"""Shows what a fine-tuned model answers beside the answers of held-out conversations."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data import Tokenizer, Validation
from deepseek_jax.inference.model import Model

T = TypeVar("T")
_SHOWN, _COUNTED = 3, 64  # conversations shown, and answered in all


class Asked(NamedTuple):
    """Ids of a conversation up to its last learned turn, and of that turn."""

    prompt: np.ndarray
    answer: np.ndarray


def asked(validation: Validation) -> list[Asked]:
    """Returns the held-out conversations, in order."""
    batch, found = validation.batch, []
    for row, tokens in enumerate(batch["tokens"]):
        segments = np.where(batch["padding"][row], 0, batch["segments"][row])
        for segment in np.unique(segments[segments > 0]):
            (places,) = np.nonzero(segments == segment)
            one = _asked(tokens[places], batch["loss_mask"][row][places])
            found += [one] if one is not None else []
    return found


def _asked(ids: np.ndarray, learned: np.ndarray) -> Asked | None:
    """Splits a conversation; None for a text, of which all is learned but the first token."""
    if not learned.any():
        return None
    end = int(np.flatnonzero(learned)[-1]) + 1
    others = np.flatnonzero(~learned[:end])
    return Asked(ids[: others[-1] + 1], ids[others[-1] + 1 : end]) if others.size > 1 else None


def spread(found: Sequence[T], count: int) -> list[T]:
    """Picks at most `count`, spread evenly over all."""
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def answers(
    cfg: Config, params: Any, balance_bias: Any, tokenizer: Tokenizer, validation: Validation
) -> dict[str, str]:
    """Answers held-out conversations, greedily, with at most `train.sample_tokens`: some of them to be read, and how many of
    more of them are the held-out answers word for word."""
    room = cfg.model.max_position_embeddings - cfg.train.sample_tokens
    chosen = spread([one for one in asked(validation) if len(one.prompt) <= room], _COUNTED)
    if not chosen or not cfg.train.sample_tokens:
        return {}
    model = Model(cfg.model, params, balance_bias, tokenizer)
    out = model.generate([one.prompt.tolist() for one in chosen], cfg.train.sample_tokens)
    stops = set(model.stop_ids)
    wanted = [[i for i in one.answer.tolist() if i not in stops] for one in chosen]
    same = sum(got == want for got, want in zip(out, wanted, strict=True))
    texts = {
        f"conversation_{i}": f"{tokenizer.decode(one.prompt)}>>{tokenizer.decode(got)}\n--- really:\n{tokenizer.decode(want)}"
        for i, (one, got, want) in enumerate(spread(list(zip(chosen, out, wanted, strict=True)), _SHOWN), 1)
    }
    return texts | {
        "word_for_word": f"{same} of {len(chosen)} answers are those of the held-out conversations"
    }

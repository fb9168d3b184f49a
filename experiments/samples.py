"""Shows what a trained model writes beside what held-out documents really say."""

from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data import Tokenizer, Validation
from deepseek_jax.data.fim import fim_prompt
from deepseek_jax.inference.model import Model

_PROMPT = 32  # tokens at most
_ROOM = 64  # tokens of a document that is worth showing, if there are such


class Gap(NamedTuple):
    """A place in a held-out document to be filled; without `after`, its continuation."""

    before: str
    really: str
    after: str = ""

    def filled(self, text: str) -> str:
        """Returns the document with `text` in the gap, and below it what really stands there."""
        end = f"<<{self.after}" if self.after else ""
        return f"{self.before}>>{text}{end}\n--- really:\n{self.really}"


def documents(validation: Validation, eos_id: int) -> list[np.ndarray]:
    """Returns the ids of the held-out documents from their beginning, as far as they lie in a window; no eos."""
    found = []
    for row, tokens in enumerate(validation.tokens):
        ends = np.flatnonzero(tokens == eos_id)
        # The first window begins with a document; in the others, one begins after each eos.
        starts = np.concatenate([[0] * (row == 0), ends + 1]).astype(int)
        bounds = [*(ends if row == 0 else ends[1:]), len(tokens)]
        found += [tokens[i:j] for i, j in zip(starts, bounds, strict=False) if j - i >= 2]
    return found


def chosen(found: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Picks at most `count` documents, spread evenly over those with room for a prompt and more, else the longest."""
    count = min(count, len(found))
    if not count:
        return []
    enough = min(_ROOM, sorted(map(len, found))[-count])
    fit = [ids for ids in found if len(ids) >= enough]
    return [fit[i * len(fit) // count] for i in range(count)]


def continuation(ids: np.ndarray, tokenizer: Tokenizer, new_tokens: int) -> Gap:
    """Cuts a document into a beginning and what follows it."""
    cut = min(_PROMPT, len(ids) // 2)
    return Gap(tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut : cut + new_tokens]))


def hole(ids: np.ndarray, tokenizer: Tokenizer) -> Gap:
    """Cuts the middle third out of a document's beginning."""
    ids = ids[: 3 * _PROMPT]
    first, last = len(ids) // 3, max(len(ids) // 3 + 1, 2 * len(ids) // 3)
    return Gap(*(tokenizer.decode(part) for part in (ids[:first], ids[first:last], ids[last:])))


def gaps(cfg: Config, tokenizer: Tokenizer, validation: Validation) -> dict[str, Gap]:
    """Returns, by name, two held-out documents to be continued and, with `data.fim_rate`, the middle of a third one."""
    picked = chosen(documents(validation, tokenizer.eos_id), 3)
    found = {
        f"continuation_{i}": continuation(ids, tokenizer, cfg.train.sample_tokens)
        for i, ids in enumerate(picked[:2], 1)
    }
    if cfg.data.fim_rate > 0 and picked:
        found["middle"] = hole(picked[-1], tokenizer)
    return found


def samples(
    cfg: Config, params: Any, balance_bias: Any, tokenizer: Tokenizer, validation: Validation
) -> dict[str, str]:
    """Fills the gaps with the model, by sampling: so small a model repeats itself when greedy."""
    found = gaps(cfg, tokenizer, validation)
    prompts = [
        fim_prompt(gap.before, gap.after, tokenizer) if gap.after else tokenizer.encode(gap.before)
        for gap in found.values()
    ]
    longest = max(map(len, prompts), default=0)
    new_tokens = min(cfg.train.sample_tokens, cfg.model.max_position_embeddings - longest)
    if not prompts or new_tokens < 1:
        return {}
    model = Model(cfg.model, params, balance_bias, tokenizer, stop_ids=[tokenizer.eos_id])
    out = model.generate(prompts, new_tokens, temperature=0.7, top_p=0.9)
    texts = (tokenizer.decode(ids, skip_special=True) for ids in out)
    return {name: gap.filled(text) for (name, gap), text in zip(found.items(), texts, strict=True)}

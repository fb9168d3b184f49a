"""Prompts with what their answers are judged by: what rollouts and distillation read.

    prompts = load(config.prompts, tokenizer)
    for prompt in prompts.train.take(32): ...    # .prompt, .ids, .columns
    checkpoint = prompts.train.state()           # JSON; prompts.train.restore(checkpoint) goes on from there

A row is {"prompt": text or messages, ...} or {"messages": [...], ...}, whose last answer, if it ends with one, is not of
the prompt but its "completion". Every other field is a column, for rewards. Rows of verl are rows of this kind; their
reward_model.ground_truth is the column "ground_truth" as well.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checks import names_that_differ, ranges, require, shown
from deepseek_jax.config import SEEDS
from deepseek_jax.data.held_out import FRACTION, share, those_held_out
from deepseek_jax.data.loader import furthest_behind
from deepseek_jax.data.report import CorpusReport
from deepseek_jax.data.row_fields import messages_of, options_of, question_of
from deepseek_jax.data.rows import Row, of_row, read_rows, row_files
from deepseek_jax.data.shuffle import permuted
from deepseek_jax.data.sources import weighted
from deepseek_jax.data.tokenizer import Tokenizer

_ORDER = 107  # keeps this random stream apart from those of packing
_NO_COLUMNS = ("prompt", "messages")


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Which questions are asked: files of rows (`data/prompts.py`), JSON lines or Parquet."""

    # a glob, a folder or a file; several by weight, their shares of the prompts: ("maths/*.jsonl=0.7", "code.jsonl=0.3")
    sources: tuple[str, ...] = ()
    validation: str | None = None  # such questions; None: hold out `validation_fraction` of them
    validation_fraction: float = FRACTION  # share of the questions held out, if `validation` is None
    max_tokens: int = 1024  # longer prompts are left out, counted and named
    seed: int = 0  # decides the order

    def __post_init__(self):
        ranges("prompts", self, "seed", 0, SEEDS - 1)
        ranges("prompts", self, "validation_fraction", 0, 1)
        ranges("prompts", self, "max_tokens", 1, 1 << 30)
        weighted(self.sources, "prompts.sources")


class Prompt(NamedTuple):
    """One question.

    Attributes:
        name: "FILE:LINE" of its row.
        prompt: as its row has it, a text or messages: what rewards get.
        ids: int32 [n], what a sampler is given: rendered, with the beginning of the answer.
        columns: the row's other fields.
        share: of its question (held_out.py).
    """

    name: str
    prompt: str | list[dict[str, Any]]
    ids: np.ndarray
    columns: dict[str, Any]
    share: float


@dataclasses.dataclass(frozen=True)
class Prompts:
    """train: an endless stream. validation: the held-out questions. report: what was read and left out."""

    train: "PromptStream"
    validation: list[Prompt]
    report: CorpusReport


class PromptStream:
    """An endless, shuffled, resumable stream of prompts; several sources take turns by their weights.

    An epoch of a source hands out each of its prompts once, in an order that (seed, source, epoch) decides.
    """

    def __init__(self, sources: Sequence[Sequence[Prompt]], weights: Sequence[float], seed: int = 0):
        self._sources, self._seed = sources, seed
        self._shares = [weight / sum(weights) for weight in weights]
        self._taken = [0] * len(sources)

    def __len__(self) -> int:
        """How many prompts there are."""
        return sum(map(len, self._sources))

    def all(self) -> list[Prompt]:
        """Each prompt once, in the order of the sources and their rows."""
        return [prompt for source in self._sources for prompt in source]

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts, the same in every process."""
        return [self._next() for _ in range(n)]

    def _next(self) -> Prompt:
        source = furthest_behind(self._shares, self._taken)
        prompts = self._sources[source]
        epoch, place = divmod(self._taken[source], len(prompts))
        self._taken[source] += 1
        (chosen,) = permuted(np.array([place]), len(prompts), (_ORDER, self._seed, source, epoch))
        return prompts[int(chosen)]

    def state(self) -> dict[str, Any]:
        """JSON-serialisable: how many prompts of each source were handed out, and what decides which they are."""
        return {"taken": list(self._taken), "data": dict(self._fingerprint)}

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for source in self._sources:
            digest.update(len(source).to_bytes(8, "big"))
            for prompt in source:
                columns = json.dumps(prompt.columns, sort_keys=True, default=str).encode()
                digest.update(
                    hashlib.sha256(prompt.ids.tobytes()).digest() + hashlib.sha256(columns).digest()
                )
        return {"prompts": digest.hexdigest()[:16], "shares": self._shares, "seed": self._seed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues at the place of `state`. Raises ValueError: no state, or one of other prompts."""
        try:
            taken, data = [int(n) for n in state["taken"]], dict(state["data"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a state of prompts: {shown(state)}") from error
        here = self._fingerprint
        other = [f"{n} was {shown(data.get(n))}, is now {here.get(n)}" for n in names_that_differ(data, here)]
        require(not other, f"the saved place is one in other prompts: {'; '.join(other)}")
        require(len(taken) == len(self._taken) and min(taken) >= 0, f"not a state of prompts: {shown(state)}")
        self._taken = taken

    def close(self) -> None:
        """Nothing goes on beside."""


def load(cfg: PromptConfig, tokenizer: Tokenizer) -> Prompts:
    """Reads, renders and encodes all prompts.

    Raises ValueError: no source, a row that is no prompt, by file and line, or a side of the split without a prompt.
    """
    require(bool(cfg.sources), "prompts.sources is empty: name the files of questions")
    sources, weights = zip(*weighted(cfg.sources, "prompts.sources"), strict=True)
    report = PromptReport()

    def read(source: str) -> list[Prompt]:
        rows = read_rows(row_files(source, report))
        return [p for p in prompts_of(rows, tokenizer) if _fits(p, cfg.max_tokens, report)]

    found = [read(source) for source in sources]
    require(any(found), f"no prompt fits prompts.max_tokens={cfg.max_tokens}{report.reasons()}")
    validation = read(cfg.validation) if cfg.validation else []
    if cfg.validation:
        asked = {prompt.share for prompt in validation}
        train = [[p for p in source if _is_new(p, asked, report)] for source in found]
    else:
        shares = np.array([prompt.share for source in found for prompt in source])
        out = iter(those_held_out(shares, cfg.validation_fraction).tolist())
        sides = [[(p, next(out)) for p in source] for source in found]
        train = [[p for p, held in side if not held] for side in sides]
        validation = [p for side in sides for p, held in side if held]
    for source, prompts in zip(sources, train, strict=True):
        require(bool(prompts), f"{source}: no prompt is left for training{report.reasons()}")
    require(bool(validation), f"{cfg.validation}: no prompt is left for validation{report.reasons()}")
    report.documents, report.held_out = sum(map(len, train)), len(validation)
    return Prompts(PromptStream(train, weights, cfg.seed), validation, report)


@dataclasses.dataclass
class PromptReport(CorpusReport):
    """`documents`, prompts for training, and those held out."""

    held_out: int = 0

    def summary(self) -> str:
        head = f"{self.documents:,} prompts, {self.held_out:,} held out"
        return "\n".join([head, *(self._line(kind, count) for kind, count in sorted(self.skipped.items()))])


def _fits(prompt: Prompt, max_tokens: int, report: CorpusReport) -> bool:
    if len(prompt.ids) <= max_tokens:
        return True
    report.skip(prompt.name, f"longer than {max_tokens} tokens, refused", f"{len(prompt.ids)} tokens")
    return False


def _is_new(prompt: Prompt, asked: set[float], report: CorpusReport) -> bool:
    if prompt.share not in asked:
        return True
    report.skip(prompt.name, "that ask what validation asks, left out")
    return False


def prompts_of(rows: Iterable[Row], tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of rows, rendered and encoded. Raises ValueError for a row that is none, by name."""
    made = list[tuple[Row, str | list[dict[str, Any]], dict[str, Any], str]]()
    for row in rows:
        with of_row(row):
            prompt, columns = split_row(row.values)
            text = prompt if isinstance(prompt, str) else _rendered(tokenizer, prompt, row.values)
            made.append((row, prompt, columns, text))
    ids: list[list[int]] = [[] for _ in made]
    for chat in (False, True):
        places = [i for i, one in enumerate(made) if isinstance(one[1], list) == chat]
        encoded = tokenizer.encode_batch([made[i][3] for i in places], allow_special=True, bos=not chat)
        for i, found in zip(places, encoded, strict=True):
            ids[i] = found
    return [
        Prompt(row.name, prompt, np.array(found, np.int32), columns, share(question_of(row.values)))
        for (row, prompt, columns, _), found in zip(made, ids, strict=True)
    ]


def _rendered(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
    template = tokenizer.chat_template
    return template.render(messages, **options_of(values, template))


def split_row(values: Mapping[str, Any]) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
    """A row's prompt, and its columns. Raises ValueError for a row that has none."""
    columns = {name: value for name, value in values.items() if name not in _NO_COLUMNS}
    model = columns.get("reward_model")
    if isinstance(model, Mapping) and "ground_truth" in model:  # verl
        columns.setdefault("ground_truth", model["ground_truth"])
    given = values.get("prompt")
    if isinstance(given, str):
        require(bool(given.strip()), "the prompt is empty")
        return given, columns
    if given is None:
        require(values.get("messages") is not None, f'no "prompt" and no "messages": {shown(sorted(values))}')
        messages = messages_of(values["messages"])
        if messages[-1]["role"] == "assistant":
            columns.setdefault("completion", messages[-1:])
            messages = messages[:-1]
    else:
        messages = messages_of(given)
        require(messages[-1]["role"] != "assistant", "the prompt ends with an answer: that is no prompt")
    require(bool(messages), "there is no message before the answer")
    return messages, columns

"""A needle in a haystack (report section 4.3): at which lengths and depths does a model find what was said once?

The hay is lines without digits, of ordinary text or a few that are said in turn (the noise of RULER, arXiv 2404.06654, which
small models learn to look through). The needle is a line that says a number, put behind a share of the hay, its depth; the
prompt ends with the needle's beginning. A model is as good as the probability that it gives to the number, which is how often
it would be drawn. All models that are compared get the same prompts. `documents` makes texts of the same kind to learn from, for
models that cannot do it yet.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.checks import ranges, require, shown
from deepseek_jax.config import DataConfig
from deepseek_jax.data.corpus import TRAIN, VALIDATION, Corpus, Reading
from deepseek_jax.data.tokenizer import Tokenizer

_VALUE = "{value}"
_MOST = 1 << 24  # tokens of a prompt
_CLOSEST = 10  # tokens of a text to learn from in which the number is said once on average, at most


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """Which cells a grid has, and what the needle says."""

    lengths: tuple[int, ...] = ()  # tokens of a prompt with its answer; empty: no grid is made
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)  # per cent of the hay that come before the needle
    samples: int = 8  # prompts of each length and depth
    hay: tuple[str, ...] = ()  # lines that are said in turn; empty: those of the run's texts
    needle: str = "# key: {value}\n"  # what is said; a prompt ends with what comes before {value}
    digits: int = 1  # of the number
    seed: int = 0  # decides hay and numbers

    def __post_init__(self):
        ranges("needle", self, "samples", 1, 100_000)
        ranges("needle", self, "digits", 1, 100)
        ranges("needle", self, "seed", 0, (1 << 32) - 1)
        for name, most, what in (("lengths", _MOST, "tokens"), ("depths", 100, "per cent")):
            values = getattr(self, name)
            ok = all(0 <= value <= most for value in values)
            require(ok, f"needle.{name}={shown(values)} must be {what} in [0, {most}]")
        parts = self.needle.split(_VALUE)
        ok = len(parts) == 2 and bool(parts[0].strip()) and not any(map(str.isdigit, self.needle))
        require(
            ok, f'needle.needle={shown(self.needle)} should be a text without digits, as "# key: {{value}}"'
        )

    @property
    def question(self) -> str:
        """The end of a prompt. Without the space before the number, which many tokenizers join with it."""
        return self.needle.split(_VALUE)[0].rstrip()

    def says(self, value: str) -> str:
        return self.needle.replace(_VALUE, value)

    def number(self, rng: np.random.Generator) -> str:
        return "".join(map(str, rng.integers(0, 10, self.digits)))


class Hay:
    """Lines of texts, with their token ids.

    Those with a digit or with the question are left out, so that the needle's number is the only one; blank lines too.

    Args:
        enough: tokens after which no more texts are read.

    Raises:
        ValueError: no line is left.
    """

    def __init__(self, texts: Iterable[str], cfg: NeedleConfig, tokenizer: Tokenizer, enough: int = 1 << 20):
        self.lines: list[str] = []
        self.ids: list[list[int]] = []
        tokens = 0
        for text in texts:
            lines = [f"{line}\n" for line in text.splitlines() if self._is_hay(line, cfg.question)]
            ids = tokenizer.encode_batch(lines)
            self.lines += lines
            self.ids += ids
            tokens += sum(map(len, ids))
            if tokens >= enough:
                break
        require(bool(self.lines), "the hay has no line without digits: give other texts")

    @staticmethod
    def _is_hay(line: str, question: str) -> bool:
        return bool(line.strip()) and question not in line and not any(map(str.isdigit, line))

    def some(self, tokens: int, rng: np.random.Generator) -> list[int]:
        """Numbers of lines that follow each other from a random one on, round the end: as many as fit into `tokens`."""
        at, chosen = int(rng.integers(len(self.ids))), []
        while tokens >= len(self.ids[at]):
            tokens -= len(self.ids[at])
            chosen.append(at)
            at = (at + 1) % len(self.ids)
        return chosen


def hay_of(data: DataConfig, cfg: NeedleConfig, tokenizer: Tokenizer, held_out: bool) -> Hay:
    """Hay of the lines that `cfg` names, or of a run's texts: those that it holds out for validation, or trains on."""
    return Hay(["\n".join(cfg.hay)] if cfg.hay else _texts(data, held_out), cfg, tokenizer)


def _texts(data: DataConfig, held_out: bool) -> Iterator[str]:
    split = VALIDATION if held_out else TRAIN
    fraction: float | None = data.validation_fraction
    sources = [source for source, _ in data.weighted_sources()]
    if data.validation:
        split, fraction, sources = TRAIN, None, [data.validation] if held_out else sources
    for source in sources:
        corpus = Corpus(source, data.text_field, fraction, None if held_out else data.validation)
        yield from (document.text for side, document in corpus.read(Reading()) if side == split)


class Question(NamedTuple):
    """One prompt and its answer: `tokens`, at most `length`, of which the last `answer` say the number; the needle lies behind
    `depth` per cent of the hay."""

    length: int
    depth: int
    tokens: list[int]
    answer: int


def questions(cfg: NeedleConfig, hay: Hay, tokenizer: Tokenizer) -> list[Question]:
    """All prompts of a grid. The depths of one sample share hay and number.

    Raises ValueError for a length that has no room for the needle and the question.
    """
    begin, found = tokenizer.encode_prompt(""), []
    for length in cfg.lengths:
        for sample in range(cfg.samples):
            rng = np.random.default_rng((cfg.seed, length, sample))
            number = cfg.number(rng)
            said = cfg.says(number)
            needle, asked = tokenizer.encode(said), tokenizer.encode(f"{said.partition(number)[0]}{number}")
            answer = len(asked) - _alike(asked, tokenizer.encode(cfg.question))
            room = length - len(begin) - len(needle) - len(asked)
            require(room >= 0, f"needle.lengths: {length} tokens have no room for needle and question")
            lines = [hay.ids[i] for i in hay.some(room, rng)]
            for depth in cfg.depths:
                place = _behind(lines, depth)
                parts = [begin, *lines[:place], needle, *lines[place:], asked]
                found.append(Question(length, depth, [i for part in parts for i in part], answer))
    return found


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first ids are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _behind(lines: Sequence[Sequence[int]], depth: int) -> int:
    """How many lines come before the needle: those that end within `depth` per cent of the tokens."""
    ends = np.cumsum([len(line) for line in lines])
    return int(np.searchsorted(ends, depth / 100 * ends[-1], side="right")) if len(lines) else 0


# --- what a model makes of it ---------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Of each length and depth the mean probability of the right answer, [length, depth] in [0, 1]."""

    lengths: tuple[int, ...]
    depths: tuple[int, ...]
    right: np.ndarray
    samples: int

    @property
    def mean(self) -> float:
        return float(self.right.mean())

    def mean_of(self, least: int, most: int) -> float:
        """Mean over the lengths in [least, most]; NaN if there is none."""
        chosen = [least <= length <= most for length in self.lengths]
        return float(self.right[chosen].mean()) if any(chosen) else float("nan")


def windows(asked: Sequence[Question], length: int) -> dict[str, np.ndarray]:
    """The questions of a length as a batch: "tokens" int32 [n, length + 1], filled up behind the answer, which no token before
    sees; "loss_mask" bool [n, length + 1], true where the answer is."""
    rows = [question for question in asked if question.length == length]
    batch = {
        "tokens": np.zeros((len(rows), length + 1), np.int32),
        "loss_mask": np.zeros((len(rows), length + 1), bool),
    }
    for i, row in enumerate(rows):
        end = len(row.tokens)
        batch["tokens"][i, :end] = row.tokens
        batch["loss_mask"][i, end - row.answer : end] = True
    return batch


Nats = Callable[[dict[str, np.ndarray]], np.ndarray]


def grid(cfg: NeedleConfig, asked: Sequence[Question], nats: Nats) -> Grid:
    """The grid of one model. nats: of a batch as `windows` has it -> [n], minus the log-probability of each row's labels that
    count."""
    right = np.zeros((len(cfg.lengths), len(cfg.depths)))
    for i, length in enumerate(cfg.lengths):
        found = np.exp(-nats(windows(asked, length)).astype(np.float64))
        right[i] = found.reshape(cfg.samples, len(cfg.depths)).mean(0)
    return Grid(cfg.lengths, cfg.depths, right, cfg.samples)


# --- texts to learn from --------------------------------------------------------------------------------------------


def documents(
    cfg: NeedleConfig, hay: Hay, tokenizer: Tokenizer, tokens: int, longest: int, seed: int
) -> Iterator[str]:
    """Texts of about `tokens` in all, each of a quarter of `longest` tokens up to that: hay in which one number is said at
    random places and at the end. How often is drawn log-uniformly from twice to every `_CLOSEST` tokens: texts that say it
    often teach it fast, those that say it twice over long distances."""
    rng = np.random.default_rng((cfg.seed, seed, longest))
    while tokens > 0:
        size = int(rng.integers(longest // 4, longest + 1))
        times = int(np.exp(rng.uniform(np.log(2), np.log(max(3, size // _CLOSEST)))))
        said = cfg.says(cfg.number(rng))
        lines = [hay.lines[i] for i in hay.some(size - times * len(tokenizer.encode(said)), rng)]
        for place in sorted(rng.integers(0, len(lines) + 1, times - 1), reverse=True):
            lines.insert(int(place), said)
        yield "".join((*lines, said))
        tokens -= size

"""Rejection sampling: which of an expert's answers become training data (report sections 5.1 and 5.4.1).

An answer is rejected for the first of the reasons that holds, so that the counts of reasons and of what is kept add up to
all answers: cut off, empty, wrong; then style (form, language, repetition, long paragraphs) and length; then those that
repeat another answer of their problem, and those that were not chosen of the ones that are left.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from deepseek_jax.checks import choice, ranges, require
from deepseek_jax.posttraining.rewards import texts
from deepseek_jax.posttraining.rewards.rules import consistency
from deepseek_jax.posttraining.rewards.rules import language as check_language

KEPT = "kept"
CHOICES = ("first", "shortest")
_GRAM = 8  # words; fewer repeat in lists and formulas that are as they should be


class Answer(NamedTuple):
    """One answer of an expert.

    Attributes:
        problem: which one it answers.
        text: without the end token.
        tokens: as they were drawn, the end token included.
        finish_reason: "stop" or "length".
        right: whether it is correct.
    """

    problem: int
    text: str
    tokens: int
    finish_reason: str
    right: bool


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which of the answers stay. The defaults of style let everything pass."""

    keep: int = 1  # answers of a problem, at most
    # of those that pass: "first", in the order in which they were drawn, or "shortest", in tokens
    choose: str = "shortest"
    pattern: str = ""  # regular expression that the whole answer must match, "." any character; empty: any
    longest: int = 0  # tokens; 0: any
    longest_paragraph: int = 0  # characters between two empty lines; 0: any
    repeated: float = 1.0  # largest share of words that end a run of 8 words which the answer had before
    language: str = ""  # of the reasoning ("en", "zh", ...: rewards/rules.py); empty: any
    language_share: float = 0.9  # smallest share of its words that are of this language

    def __post_init__(self):
        choice("select.choose", self.choose, CHOICES)
        ranges("select", self, "keep", 1, 1 << 31)
        ranges("select", self, "longest longest_paragraph", 0, 1 << 31)
        ranges("select", self, "repeated language_share", 0, 1)
        if self.language:
            check_language(self.language)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"select.pattern={self.pattern!r} is no regular expression: {error}") from error


Rule = Callable[[Answer], bool]  # whether an answer is to be rejected


def rules(cfg: SelectionConfig) -> dict[str, Rule]:
    """Reason -> rule, in the order in which they are asked; those that reject nothing are left out."""
    found: dict[str, Rule] = {
        "cut off": lambda a: a.finish_reason == "length",
        "empty": lambda a: not a.text.strip(),
        "wrong": lambda a: not a.right,
    }
    if cfg.pattern:
        form = re.compile(cfg.pattern, re.DOTALL)
        found["form"] = lambda a: form.fullmatch(a.text.strip()) is None
    if cfg.language:
        found["language"] = lambda a: consistency(texts.reasoning(a.text), cfg.language) < cfg.language_share
    if cfg.repeated < 1:
        found["repetition"] = lambda a: repeated_share(a.text) > cfg.repeated
    if cfg.longest_paragraph:
        found["long paragraph"] = lambda a: longest_paragraph(a.text) > cfg.longest_paragraph
    if cfg.longest:
        found["too long"] = lambda a: a.tokens > cfg.longest
    return found


def select(answers: Sequence[Answer], cfg: SelectionConfig) -> list[str]:
    """For each answer `KEPT`, or why it is rejected."""
    tests = rules(cfg)
    said = [next((reason for reason, rejects in tests.items() if rejects(a)), KEPT) for a in answers]
    for places in _by_problem(answers, said):
        seen: set[str] = set()
        for i in places:
            if answers[i].text in seen:
                said[i] = "repeats another"
            seen.add(answers[i].text)
        left = [i for i in places if said[i] == KEPT]
        if cfg.choose == "shortest":
            left.sort(key=lambda i: answers[i].tokens)  # stable: of equally long ones the first
        for i in left[cfg.keep :]:
            said[i] = "not chosen"
    return said


def _by_problem(answers: Sequence[Answer], said: Sequence[str]) -> Iterator[list[int]]:
    """Places of the answers that passed, problem by problem."""
    places = collections.defaultdict(list)
    for i, answer in enumerate(answers):
        if said[i] == KEPT:
            places[answer.problem].append(i)
    yield from places.values()


# --- style ----------------------------------------------------------------------------------------------------------


def repeated_share(text: str) -> float:
    """Share of the words that end a run of 8 words which stood there before: near 1 for a loop, 0 for a text without."""
    words = text.split()
    runs = [tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)]
    return (len(runs) - len(set(runs))) / len(words) if words else 0.0


def longest_paragraph(text: str) -> int:
    """Characters of the longest part between empty lines."""
    return max(len(part.strip()) for part in re.split(r"\n\s*\n", text))


def require_kept(said: Sequence[str]) -> None:
    """Raises ValueError, with the reasons, where nothing is kept."""
    counts = collections.Counter(said)
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
    require(counts[KEPT] > 0, f"none of {len(said)} answers is kept: {reasons or 'there are none'}")

"""What users ask of the cluster: how much over a day, how long, and what of it was asked before.

DeepSeek published totals of a day (open-infra-index, day 6, 24 hours to 2025-02-28 12:00 UTC+8): tokens in and out, the share of
input that its disk cache had, the mean length of the cache while a token is drawn. From these follow mean lengths; what is
assumed beside them is said at each attribute of `Day`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PAGE = 64
SECONDS = 86_400.0
LONGEST = 100_000  # tokens of a prompt; a longer conversation begins anew


@dataclasses.dataclass(frozen=True)
class Day:
    """Demand of a day. A conversation has turns: each sends all that was said, and a new text.

    Attributes:
        input, output: tokens. hits: share of the input that the cache has. context: mean tokens in the cache of a sequence,
            over the tokens that are drawn.
        peak: load of the busiest hour over the mean; as published, of nodes. Assumed: a plateau, and one valley around `quiet`
            o'clock, some `valley` hours wide, as deep as the mean asks.
        answer_spread, text_spread: standard deviation over mean of an answer and of a new text, both log-normal; assumed.
        pause: mean seconds between an answer and the next turn, exponential; assumed.
    """

    input: float = 608e9
    output: float = 168e9
    hits: float = 0.563
    context: float = 4989.0
    peak: float = 278 / 226.75
    quiet: float = 5.0
    valley: float = 3.5
    answer_spread: float = 1.0
    text_spread: float = 1.0
    pause: float = 60.0

    @property
    def answer(self) -> float:
        """Mean tokens of an answer: prompt + half of an answer, weighted by its length, is the mean context."""
        return self.context / (self.input / self.output + (1 + self.answer_spread**2) / 2)

    @property
    def prompt(self) -> float:
        """Mean tokens of a prompt."""
        return self.answer * self.input / self.output

    @functools.cached_property
    def turn(self) -> float:
        """Chance that a prompt goes on with a conversation. Whole pages of it are found, half a page less in the mean."""
        turn = 0.0
        for _ in range(100):
            turn = (self.prompt - self._text(turn)) / (self.prompt + self.answer)
        return turn

    def _text(self, turn: float) -> float:
        return self.prompt * (1 - self.hits) - turn * (PAGE - 1) / 2

    @property
    def text(self) -> float:
        """Mean tokens that a turn adds before its answer."""
        return self._text(self.turn)

    @property
    def attended(self) -> float:
        """Mean tokens that a token which prefill computes attends to."""
        return self.prompt - self.text + self.text * (1 + self.text_spread**2) / 2

    @property
    def requests(self) -> float:
        """Per second, mean of the day."""
        return self.output / self.answer / SECONDS

    def load(self, hour: float) -> float:
        """Over the mean."""
        away = (hour - self.quiet + 12) % 24 - 12
        depth = (1 - 1 / self.peak) * 24 / (self.valley * math.sqrt(math.pi))
        return self.peak * (1 - depth * math.exp(-((away / self.valley) ** 2)))


class Segment(NamedTuple):
    """Tokens of a text or an answer: its number, and a piece of a common stream. So no two begin alike."""

    number: int
    start: int
    length: int


Text = tuple[Segment, ...]


class Asked(NamedTuple):
    """A conversation with a new text, and what will be answered."""

    text: Text
    answer: Segment


class Users:
    """Draws what is asked, and keeps the conversations that ended with an answer.

    made_up: those that began before the simulation, which the cache is to be told of.
    """

    def __init__(self, day: Day, rng: np.random.Generator):
        self.day, self.rng = day, rng
        self._stream: list[int] = rng.integers(0, 129_280, 1 << 18).tolist()
        self._numbers = 0
        self._times: list[float] = []
        self._texts: list[Text] = []
        self.made_up: list[Text] = []

    def tokens(self, text: Sequence[Segment]) -> list[int]:
        found: list[int] = []
        for s in text:
            found.append(s.number)
            found += self._stream[s.start : s.start + s.length - 1]
        return found

    def ask(self, now: float) -> Asked:
        goes_on = self.rng.random() < self.day.turn
        before = self._earlier(now - self.rng.exponential(self.day.pause)) if goes_on else ()
        return Asked((*before, self._new_text()), self._new_answer())

    def amid(self) -> Asked:
        """One whose answer is being drawn for some time already: what there is of it belongs to the text. Longer answers are
        met more often."""
        asked = self.ask(-math.inf)
        spread = self.day.answer_spread
        length = self._segment(self.day.answer * (1 + spread**2), spread)
        there = int(self.rng.integers(1, length.length + 1))
        said = length._replace(length=there)
        return Asked((*asked.text, said), length._replace(length=length.length - there + 1))

    def ended(self, asked: Asked, now: float) -> None:
        """An answer was given. Calls come in the order of time."""
        self._times.append(now)
        self._texts.append((*asked.text, asked.answer))

    def _earlier(self, when: float) -> Text:
        """A conversation whose last answer ended about then."""
        at = int(np.searchsorted(self._times, when)) if when > (self._times or [math.inf])[0] else -1
        text = self._texts[min(at, len(self._texts) - 1)] if at >= 0 else self._made_up()
        return text if sum(s.length for s in text) < LONGEST else ()

    def _made_up(self) -> Text:
        turns = self.rng.geometric(1 - self.day.turn)
        text = tuple(s for _ in range(turns) for s in (self._new_text(), self._new_answer()))
        self.made_up.append(text)
        return text

    def _new_text(self) -> Segment:
        return self._segment(self.day.text, self.day.text_spread)

    def _new_answer(self) -> Segment:
        return self._segment(self.day.answer, self.day.answer_spread)

    def _segment(self, mean: float, spread: float) -> Segment:
        variance = math.log(1 + spread**2)
        length = self.rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance)) if spread else mean
        tokens = min(max(1, round(length)), LONGEST)
        self._numbers += 1
        return Segment(129_280 + self._numbers, int(self.rng.integers(0, len(self._stream) - tokens)), tokens)

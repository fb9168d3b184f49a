"""Pairs of answers, judged in both orders: preference data as R1's helpfulness model was trained on, and win rates.

Each pair of comparable length is judged several times. Which of the two is shown first is drawn, half of the times each, so
that what a judge gives to a place, and not to an answer, cancels. A pair is kept if the scores differ by enough on average.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.checks import require
from deepseek_jax.posttraining import judge_forms
from deepseek_jax.posttraining.asking import Ask
from deepseek_jax.posttraining.judge_forms import PAIR, summary
from deepseek_jax.posttraining.selection import Answer
from deepseek_jax.posttraining.votes import Rate, mean_score, outcome, rate

TIMES, MARGIN = (
    4,
    1.0,
)  # R1's: judgements of a pair, and the smallest mean difference, which is not enough yet
LENGTHS = (
    1.5  # the longer one of comparable answers is at most so many times as long; R1's text has no number
)


class Pair(NamedTuple):
    """Two answers to one question."""

    question: str
    one: str
    two: str


class Judged(NamedTuple):
    """A pair with its judgements.

    Attributes:
        swapped: of each judgement, whether the second answer was shown first.
        scores: of each judgement those of (one, two), whatever the order was; None where it could not be read.
    """

    pair: Pair
    swapped: list[bool]
    scores: list[tuple[float, float] | None]

    @property
    def difference(self) -> float | None:
        """Mean score of the first answer minus that of the second; None without a judgement.

        The mean over both orders, so that a judgement that cannot be read moves nothing to the other order's side.
        """
        sides = [
            mean_score(
                [
                    s[0] - s[1]
                    for s, order in zip(self.scores, self.swapped, strict=True)
                    if s and order is side
                ]
            )
            for side in (False, True)
        ]
        return mean_score(sides)


def comparable(one: str, two: str, lengths: float = LENGTHS) -> bool:
    """Whether two texts differ, and the longer one has at most `lengths` times the characters of the other."""
    short, long = sorted((len(one), len(two)))
    return one != two and long <= lengths * short


def pairs_of(
    problems: Sequence[Mapping[str, Any]], answers: Sequence[Answer], lengths: float = LENGTHS
) -> list[Pair]:
    """The first two comparable answers to each problem, of those that ended by themselves; none of a problem without."""
    texts: dict[int, list[str]] = {}
    for answer in answers:
        if answer.finish_reason != "length" and answer.text.strip():
            texts.setdefault(answer.problem, []).append(answer.text)
    found = []
    for problem, said in texts.items():
        both = (two for two in itertools.combinations(said, 2) if comparable(*two, lengths))
        if (first := next(both, None)) is not None:
            found.append(Pair(problems[problem]["prompt"][-1]["content"], *first))
    return found


def orders(times: int, seed: str) -> list[bool]:
    """Whether the second answer is shown first, for each judgement of a pair: half of the times, which ones is drawn; of an odd
    number, the last one is drawn alone."""
    draw = random.Random(seed)
    halves = [False, True] * (times // 2) + [draw.random() < 0.5] * (times % 2)
    draw.shuffle(halves)
    return halves


def judged(
    ask: Ask,
    pairs: Sequence[Pair],
    times: int = TIMES,
    principles: Sequence[str] = (),
    reads: str = "summary",
    seed: int = 0,
) -> list[Judged]:
    """Each pair judged `times` times, in one call. reads: "summary", what is behind the reasoning, or "all" of an answer."""
    require(times >= 1, f"times={times} must be positive")
    asked = [orders(times, f"{seed} {pair.question} {pair.one} {pair.two}") for pair in pairs]
    conversations = [
        _conversation(pair, order, principles, reads)
        for pair, swapped in zip(pairs, asked, strict=True)
        for order in swapped
    ]
    answers = iter(ask(conversations))
    return [
        Judged(pair, swapped, [_read(next(answers), order) for order in swapped])
        for pair, swapped in zip(pairs, asked, strict=True)
    ]


def _conversation(pair: Pair, swapped: bool, principles: Sequence[str], reads: str) -> Any:
    one, two = summary(pair.one, reads), summary(pair.two, reads)
    return judge_forms.messages(PAIR, (pair.question, *((two, one) if swapped else (one, two))), principles)


def _read(judgement: str, swapped: bool) -> tuple[float, float] | None:
    scores = judge_forms.read(PAIR, judgement)
    return scores if scores is None or not swapped else (scores[1], scores[0])


# --- what comes of them ---------------------------------------------------------------------------------------------


def preferences(results: Sequence[Judged], margin: float = MARGIN) -> Iterator[dict[str, Any]]:
    """Rows {"prompt", "chosen", "rejected", "margin"} of messages: pairs whose mean scores differ by more than `margin`."""
    for result in results:
        difference = result.difference
        if difference is None or abs(difference) <= margin:
            continue
        _, one, two = result.pair
        chosen, rejected = (one, two) if difference > 0 else (two, one)
        yield {
            "prompt": [{"role": "user", "content": result.pair.question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "margin": abs(difference),
        }


def win_rate(results: Sequence[Judged]) -> Rate:
    """How often the first answers win, a tie is half of one; pairs without a judgement do not count."""
    return rate([outcome(d) for d in (result.difference for result in results) if d is not None])


class OrderEffect(NamedTuple):
    """What the order of two answers does to a judge.

    Attributes:
        first: how often the one that was shown first won, a tie is half; 0.5 of a judge that does not care.
        agreement: how often the majority of one order has the winner of the other's.
    """

    first: Rate
    agreement: Rate


def order_effect(results: Sequence[Judged]) -> OrderEffect:
    """Of pairs that were judged in both orders; raises ValueError for fewer than two."""
    first, agreement = [], []
    for result in results:
        sides: dict[bool, list[float]] = {False: [], True: []}
        for swapped, scores in zip(result.swapped, result.scores, strict=True):
            if scores is not None:
                sides[swapped].append(scores[0] - scores[1])
        if sides[False] and sides[True]:
            plain, swapped_mean = (sum(sides[s]) / len(sides[s]) for s in (False, True))
            first.append((outcome(plain) + outcome(-swapped_mean)) / 2)
            agreement.append(float(outcome(plain) == outcome(swapped_mean)))
    return OrderEffect(rate(first), rate(agreement))

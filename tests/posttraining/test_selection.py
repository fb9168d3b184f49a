"""Which answers of an expert are kept, and why the others are not."""

import collections
import json
import re

import numpy as np
import pytest

from deepseek_jax.posttraining import data_card
from deepseek_jax.posttraining.length_plot import accuracy_by_length
from deepseek_jax.posttraining.selection import (
    KEPT,
    Answer,
    SelectionConfig,
    longest_paragraph,
    repeated_share,
    require_kept,
    select,
)


def answer(text="the sum is 4", tokens=5, problem=0, right=True, finish="stop"):
    return Answer(problem, text, tokens, finish, right)


STRICT = {
    "pattern": ".*4.*",
    "longest": 9,
    "longest_paragraph": 60,
    "repeated": 0.3,
    "language": "en",
    "language_share": 0.8,
}


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (answer(), KEPT),
        (answer(finish="length", right=False), "cut off"),
        (answer(" \n", right=False), "empty"),
        (answer(right=False), "wrong"),
        (answer("the sum is four"), "form"),
        (answer("die Summe ist 4, 总和是四总和是四总和是四"), "language"),
        (answer("4 " + "and one more and one more " * 4), "repetition"),
        (answer("4 " + "is what two and two give, as anybody can see " * 2), "long paragraph"),
        (answer(tokens=10), "too long"),
    ],
)
def test_each_reason_is_given_for_what_it_names(one, reason):
    assert select([one], SelectionConfig(**STRICT)) == [reason]
    if reason not in (KEPT, "cut off", "empty", "wrong"):
        assert select([one], SelectionConfig()) == [KEPT]


def test_correctness_comes_before_style_and_style_before_length():
    worst = answer("no", 99, right=False)
    better = worst._replace(right=True)
    best = better._replace(text="4")
    assert select([worst, better, best], SelectionConfig(**STRICT)) == ["wrong", "form", "too long"]


LENGTHS = [7, 3, 5, 3, 4]


@pytest.mark.parametrize(
    ("choose", "keep", "kept"), [("shortest", 1, [1]), ("shortest", 3, [1, 3, 4]), ("first", 2, [0, 1])]
)
def test_of_right_answers_the_first_or_the_shortest_stay(choose, keep, kept):
    answers = [answer(f"4 {i}", n) for i, n in enumerate(LENGTHS)]
    wrong, other = answer("5", 1, right=False), answer("4", 9, problem=1)
    said = select([*answers, wrong, other], SelectionConfig(choose=choose, keep=keep))
    assert [i for i, reason in enumerate(said) if reason == KEPT] == [*kept, 6]
    assert said[5] == "wrong" and said.count("not chosen") == len(LENGTHS) - keep


def test_an_answer_that_stands_there_already_is_kept_once():
    twice = [answer(), answer(), answer(problem=1)]
    assert select(twice, SelectionConfig(keep=5)) == [KEPT, "repeats another", KEPT]


def test_measures_of_style():
    words = [f"w{i}" for i in range(16)]
    assert repeated_share(" ".join(words)) == 0 == repeated_share("")
    assert repeated_share(" ".join(words * 2)) == 9 / 32  # all runs inside of the copy
    assert longest_paragraph("ab\ncd\n \nefg") == 5


def test_no_reason_is_forgotten_and_the_card_adds_up():
    draw = np.random.default_rng(0)
    answers = [
        answer(
            draw.choice(["4", "the sum is 4", "four", "", "4 总和总和总和"]),
            int(draw.integers(1, 14)),
            int(draw.integers(6)),
            bool(draw.random() < 0.6),
            draw.choice(["stop", "length"]),
        )
        for _ in range(300)
    ]
    said = select(answers, SelectionConfig(**STRICT))
    card = data_card.card_of(answers, said, {"original": [3, 4], "expert": [5]})
    assert card["kept"] + sum(card["rejected"].values()) == card["answers"] == 300
    assert card["rejected"] == dict(collections.Counter(r for r in said if r != KEPT))
    assert len(card["rejected"]) > 5 and 0 < card["kept"] == card["problems with a kept answer"] <= 6
    shares = [np.mean([a.right for a in answers if a.problem == p]) for p in range(6)]
    assert card["accuracy"]["mean"] == pytest.approx(np.mean(shares), rel=1e-12)
    assert card["accuracy"]["error"] == pytest.approx(np.std(shares, ddof=1) / np.sqrt(6), rel=1e-12)
    kept = [a.tokens for a, reason in zip(answers, said, strict=True) if reason == KEPT]
    assert card["tokens of answers"]["kept"]["mean"] == pytest.approx(np.mean(kept), rel=1e-12)
    assert card["rows"]["original"] == {"rows": 2, "learned tokens": 7}
    assert json.loads(data_card.as_json(card)) == card
    page = data_card.as_markdown(card, "sums")
    assert all(f"| {name} | {n} |" in page for name, n in card["rejected"].items())


def test_accuracy_by_length_counts_what_is_longer_as_wrong():
    limits, accuracy = accuracy_by_length(np.array([3, 5, 3, 9]), np.array([True, True, False, True]))
    assert limits.tolist() == [3, 5, 9] and accuracy.tolist() == [0.25, 0.5, 0.75]


def test_nothing_kept_is_an_error_with_the_reasons():
    with pytest.raises(ValueError, match=re.escape("none of 3 answers is kept: 2 wrong, 1 cut off")):
        require_kept(["wrong", "cut off", "wrong"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choose": "longest"}, "select.choose='longest' is not one of ['first', 'shortest']"),
        ({"pattern": "("}, "select.pattern='(' is no regular expression: missing ), unterminated subpattern"),
        ({"language": "tlh"}, "language 'tlh' is not one of ["),
        ({"keep": 0}, "select.keep=0 must be positive"),
        ({"repeated": 1.5}, "select.repeated=1.5 must be <= 1"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SelectionConfig(**change)

"""Rewards by rules: what counts as the same answer, what has the form, what is too long, what is in one language."""

import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.posttraining.problems import TASKS
from deepseek_jax.posttraining.rewards import (
    RewardConfig,
    Rewards,
    TimedOut,
    Weighted,
    columns_of,
    rewards_named,
    rules,
    texts,
    verl,
)
from deepseek_jax.posttraining.rewards.equality import near, number, same
from deepseek_jax.posttraining.tasks import FORMS, rows


def score(function, text, **row):
    (found,) = function(
        prompts=["?"], completions=[text], completion_ids=[[1]], **{k: [v] for k, v in row.items()}
    )
    return found


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("82", 82),
        ("-7", -7),
        ("\u22127", -7),
        ("+7", 7),
        ("1,234,567.50", Fraction(2469135, 2)),
        ("1{,}234", 1234),
        (r"1\,234", 1234),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("2.5e3", 2500),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac34", Fraction(3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("50%", Fraction(1, 2)),
        (r"50\%", Fraction(1, 2)),
        (r"\$18", 18),
        ("$18$", 18),
        (r"\text{12}", 12),
        ("12.", 12),
        ("007", 7),
    ],
)
def test_numbers(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "-",
            ".",
            "e5",
            "1,23",
            "12,34,567",
            "1.2.3",
            "3/0",
            "1/2/3",
            "3 5 7",
            "x",
            "1e999",
            "--5",
            "+-5",
        ),
        *(
            "nan",
            "inf",
            "1_000",
            "²",
            "٣",
            "1" * 300,
            r"\frac{}{}",
            r"\frac{1}{0}",
            r"1.5\frac{1}{2}",
            "0x10",
        ),
        "9" * 5000,  # more digits than Python reads
    ],
)
def test_no_numbers(text):
    assert number(text) is None


def test_the_same_answer():
    assert same("1,234", "1234") and same(r"\frac{1}{2}", "0.5") and same("0.50", "1/2")
    assert not same("0.333", "1/3") and near("0.3333", "1/3", 1e-3) and not near("0.33", "1/3", 1e-3)
    assert near("5", "0", 1e-4) is False and near("0.0", "0", 1e-4)
    assert near("5", "yes", 1e-4) is None and near("yes", "5", 1e-4) is False
    assert same("3  5 7", "3 5 7") and not same("3 5 7", "5 3 7") and same("Add", "add.")
    assert same(r"\text{Paris}", "paris") and not same("", "0")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.,/-+eE%$\\{} frac\u2212", max_size=60))
def test_any_text_is_a_number_or_none_and_equals_itself(text):
    found = number(text)
    assert found is None or isinstance(found, Fraction)
    assert same(text, text)


def test_long_texts_take_no_longer_than_their_length():
    """Nests, repeats and digits that make a careless expression quadratic or a careless number endless."""
    for piece in (
        "\\boxed{",
        "<answer>",
        "1,000",
        "{",
        "\\frac{",
        "</think>",
        "```\n",
        "```a\n",
        "a1",
        "9e9",
    ):
        text = piece * (300_000 // len(piece))
        begin = time.process_time()
        for reward in (rules.answer, rules.boxed, rules.tagged, rules.format_tagged, rules.format_code):
            assert score(reward, text, answer="1") == 0
        assert rules.consistency(text, "en") <= 1
        assert time.process_time() - begin < 2, piece


# --- where an answer stands -------------------------------------------------------------------------------


def test_the_last_box_with_its_braces_matched():
    assert texts.boxed(r"so \boxed{1} or \boxed{\frac{1}{2}} here") == r"\frac{1}{2}"
    assert texts.boxed(r"\boxed{ \{1, 2\} }") == r"\{1, 2\}"
    assert texts.boxed(r"\boxed {7}") == "7" and texts.boxed(r"\boxed{\text{a}{b}}") == r"\text{a}{b}"
    assert texts.boxed("no box") is None
    assert texts.boxed(r"\boxed{1} and \boxed{2") is None  # cut off: the last one counts
    assert texts.boxed("\\boxed{1\\") is None


def test_the_last_tag():
    assert texts.tagged("<answer>1</answer> <answer> 2 </answer>") == "2"
    assert texts.tagged("<answer>1</answer><answer>2") is None and texts.tagged("2</answer>") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"7+5=12, 4+3+1=8. \boxed{82}", (1, 1, 0)),
        ("<think>82</think><answer>82</answer>", (1, 0, 1)),
        (r"<think>..</think><answer>\boxed{82}</answer>", (1, 1, 0)),
        (r"<think>\boxed{82}</think> It is 83: \boxed{83}", (0, 0, 0)),
        (r"<think>\boxed{82}", (0, 0, 0)),  # never says anything
        (r"\boxed{82} no, \boxed{81}", (0, 0, 0)),
        ("82", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_right_answers(text, found):
    assert tuple(score(f, text, answer="82") for f in (rules.answer, rules.boxed, rules.tagged)) == found


def test_reasoning_that_a_prompt_opened_and_no_answer_ended():
    for prompt, right in (("What?<think>\n", 0), ("What?", 1)):
        assert score(rules.answer, texts.behind(prompt, r"it is \boxed{82}, or"), answer="82") == right
        closed = texts.behind(prompt, r"it is 82</think>\boxed{82}")
        assert score(rules.answer, closed, answer="82") == 1 and texts.reasoning(closed) == "it is 82"


def test_where_the_truth_stands():
    text = r"\boxed{18}"
    for column in ("answer", "solution", "ground_truth"):
        assert score(rules.answer, text, **{column: "18"}) == 1
    assert score(rules.answer, text, answer="9 + 9 = <<9+9=18>>18\n#### 18") == 1
    assert score(rules.answer, text, solution=r"It is $\boxed{18}$.") == 1
    assert score(rules.answer, text, answer=18) == 1
    assert score(rules.answer, text, reward_model={"style": "rule", "ground_truth": "18"}) == 1
    assert score(rules.answer, text, answer=None) is None and score(rules.answer, text) is None
    for truth in ("", ".", "$"):  # nothing is no answer, whatever the row says
        assert score(rules.answer, "I do not know", answer=truth) == score(rules.boxed, "", answer=truth) == 0


def test_conversations_and_what_trl_gives_beside_columns():
    """TRL calls with its state and callbacks among the columns."""
    given = {"completions": [[{"role": "assistant", "content": r"\boxed{3}"}]], "answer": ["3"]}
    beside = {"trainer_state": object(), "log_extra": print, "log_metric": print}
    assert rules.answer(
        prompts=[[{"role": "user", "content": "1+2"}]], completion_ids=[[5]], **given, **beside
    ) == [1]
    assert {f.__name__ for f in (rules.answer, rules.overlong(8, 4), rules.language("en"))} == {
        *("answer", "overlong", "language")
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", sorted(TASKS.keys() - {"program"}))
def test_the_completions_of_all_tasks_are_right_and_have_their_form(task, form):
    made = rows(f"tasks:{task}/{form}/20")
    completions = [row["completion"] for row in made]
    given = {"prompts": [row["prompt"] for row in made], "completion_ids": [[0]] * len(made)}
    columns = columns_of(made)
    assert sorted(columns) == ["answer", "task", "tests"]
    assert rules.answer(completions=completions, **given, **columns) == [1.0] * len(made)
    of_form = rules.format_tagged if form == "tagged" else rules.format_boxed
    assert of_form(completions=completions, **given) == [1.0] * len(made)
    wrong = [row["completion"][0]["content"].replace(str(row["answer"]), "1 0") for row in made]
    assert rules.answer(completions=wrong, **given, **columns) == [0.0] * len(made)


# --- form, length, language -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tagged", "box", "code"),
    [
        ("<think>a</think> <answer>1</answer>\n", 1, 0, 0),
        ("a</think><answer>1</answer>", 1, 0, 0),  # the prompt opened it
        ("<think>a</think><answer>1</answer> and", 0, 0, 0),
        ("<think>a</think><answer></answer>", 0, 0, 0),
        ("<think>a<think>b</think><answer>1</answer>", 0, 0, 0),
        ("<answer>1</answer><think>a</think>", 0, 0, 0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", 0, 0, 0),
        (r"so \boxed{1}", 0, 1, 0),
        (r"\boxed{1}\boxed{2}", 0, 0, 0),
        (r"\boxed{}", 0, 0, 0),
        ("```python\nx = 1\n```", 0, 0, 1),
        ("```python\nx = 1\n```\n```\ny\n```", 0, 0, 0),
        ("```python\nx = 1", 0, 0, 0),
    ],
)
def test_forms(text, tagged, box, code):
    found = [score(f, text) for f in (rules.format_tagged, rules.format_boxed, rules.format_code)]
    assert found == [tagged, box, code]


def test_overlong_by_its_vector():
    lengths = (24, 25, 28, 32, 33, 0, 1000)
    ids = [[0] * n for n in lengths]
    found = rules.overlong(32, 8)(prompts=ids, completions=ids, completion_ids=ids)
    assert found == [0, -0.125, -0.5, -1, -1, 0, -1]
    for margin in (0, 33):
        with pytest.raises(ValueError, match=f"the margin of {margin} tokens must lie in"):
            rules.overlong(32, margin)


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("two and two make four", "en", 1),
        ("two 和 two", "en", 2 / 3),
        ("二加二等于四", "zh", 1),
        ("so 二加二 ok", "zh", 3 / 5),
        ("1 + 2 = 3", "zh", 1),
        (r"\frac{1}{2} `x + y` ```python" + "\nfoo bar\n``` 二", "zh", 1),
        ("два and two", "ru", 1 / 3),
        ("かな漢字カナ", "ja", 1),
        ("<think>二二</think><answer>yes</answer>", "zh", 1),  # the reasoning alone counts
        ("αβγ", "el", 1),
    ],
)
def test_language(text, language, share):
    assert score(rules.language(language), text) == pytest.approx(share)


def test_a_coin_knows_nothing_and_forgets_nothing():
    prompts, ids = [f"{i} + 1" for i in range(1000)], [[i, 2] for i in range(1000)]
    found = rules.coin(prompts, prompts, ids)
    assert {*found} == {0.0, 1.0} and abs(sum(found) - 500) < 4 * 250**0.5  # four standard deviations
    assert found == rules.coin(prompts, prompts, np.asarray(ids)) != rules.coin(prompts, prompts, ids[::-1])


# --- several ----------------------------------------------------------------------------------------------


def constant(*values):
    return lambda prompts, completions, completion_ids, **columns: list(values)


def called(rewards, n=3, **columns):
    return rewards(["q"] * n, ["a"] * n, [[1]] * n, **columns)


def test_weights_none_and_timeouts():
    rewards = Rewards(
        [Weighted("a", 2.0, constant(1, None, 0)), Weighted("b", -0.5, constant(1.0, 0.5, TimedOut(0)))]
    )
    scores = called(rewards)
    np.testing.assert_array_equal(scores.total, [1.5, -0.25, 0])
    np.testing.assert_array_equal(scores.parts["a"], [1, np.nan, 0])
    assert scores.total.dtype == np.float64 and scores.timeouts == {"a": 0, "b": 1}


def test_a_reward_that_raises_ends_the_run_with_its_traceback():
    def broken(prompts, completions, completion_ids, **columns):
        raise ZeroDivisionError("in the grader")

    with pytest.raises(ZeroDivisionError, match="in the grader") as caught:
        called(Rewards([Weighted("mine", 1.0, broken)]))
    assert caught.value.__notes__ == ["raised by the reward 'mine'"]
    assert any(entry.name == "broken" for entry in caught.traceback)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 2), "reward 'r' gave 2 scores for 3 completions"),
        ((1, 2, float("nan")), "gave nan: a score is a finite number or None"),
        ((1, 2, "3"), "gave '3': a score is a finite number"),
        ((1, None, 0), "none of the rewards .'r'. applies to 1 prompts, such as 'q'"),
    ],
)
def test_wrong_scores_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        called(Rewards([Weighted("r", 1.0, constant(*values))]))


def test_columns_of_another_length_are_an_error():
    with pytest.raises(ValueError, match="3 prompts have 2 answer"):
        called(Rewards([Weighted("r", 1.0, constant(1, 1, 1))]), answer=["1", "2"])


def test_rewards_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def lengths(prompts, completions, **columns):\n    return [len(c) for c in completions]\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    return {'score': float(solution_str == ground_truth and data_source == 'd' and extra_info == {'i': 1})}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = ("answer", "overlong=0.5", "my_rewards:lengths=0.1", "verl:my_rewards:compute_score", "judge=2")
    rewards = rewards_named(names, RewardConfig(longest=4, margin=2), {"judge": constant(0.25)})
    scores = rewards(
        ["q"], ["4"], [[1, 2, 3]], answer=["4"], data_source=["d"], extra_info=[{"i": 1}]
    )  # no box: the answer is wrong
    assert [reward.weight for reward in rewards.rewards] == [1, 0.5, 0.1, 1, 2]
    assert {name: float(part[0]) for name, part in scores.parts.items()} == {
        **{"answer": 0, "overlong": -0.5, "my_rewards:lengths": 1},
        **{"verl:my_rewards:compute_score": 1, "judge": 0.25},
    }
    assert scores.total[0] == pytest.approx(-0.25 + 0.1 + 1 + 0.5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "there is no reward"),
        (("answr",), "'answr' is not one of .* did you mean 'answer'"),
        (("answer=much",), 'reward \'answer=much\' should be "NAME" or "NAME=WEIGHT"'),
        (("answer=nan",), "the weight of reward 'answer' is nan"),
        (("answer", "answer=2"), "a reward stands twice"),
        (("no.such:module",), "should be \"package.module:function\": No module named 'no'"),
        (("math:pi",), "reward 'math:pi' is no function"),
    ],
)
def test_wrong_names_are_one_line(names, message):
    with pytest.raises(ValueError, match=message):
        rewards_named(names)


def test_verls_shape():
    assert (
        verl.compute_score("gsm8k", r"\boxed{18}", "18")
        == 1
        == verl.compute_score("d", "<answer>18</answer>", 18, {})
    )
    assert verl.compute_score("gsm8k", r"\boxed{17}", "18", None) == 0


def test_threads_do_not_disturb_each_other():
    """No signal, no state: 800 calls on eight threads, none of them the main one."""
    text = r"<think>\boxed{1}</think> \boxed{1\frac{1}{2}}"

    def many(i):
        assert threading.current_thread() is not threading.main_thread()
        return [
            score(rules.answer, text, answer=truth)
            for truth in ("1.5", "1", "3/2", str(i))
            for _ in range(25)
        ]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(many, range(2, 10)):
            assert found == [1.0] * 25 + [0.0] * 25 + [1.0] * 25 + [0.0] * 25


@pytest.mark.parametrize(
    "define, takes",
    [
        (lambda answer, row: [], r"takes \(answer, row\), and is called with prompts"),
        (lambda prompts, completions, **columns: [], None),
        (lambda prompts, completions, completion_ids, answer, tests=None: [], None),
        (lambda prompts, texts, **columns: [], None),
        (lambda prompts, completions: [], r"takes \(prompts, completions\)"),
    ],
)
def test_an_own_reward_that_cannot_be_called_is_refused_at_once(define, takes, monkeypatch):
    """Which columns there are, the rows will say."""
    monkeypatch.setitem(sys.modules, "of_ones_own", types.SimpleNamespace(reward=define))
    if takes is None:
        assert rewards_named(("of_ones_own:reward",)).rewards[0].function is define
        return
    with pytest.raises(ValueError, match=takes):
        rewards_named(("of_ones_own:reward",))

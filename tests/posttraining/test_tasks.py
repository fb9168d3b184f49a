"""Problems are right by an oracle of their own, and no question stands on both sides of the split."""

import re
from collections import Counter

import numpy as np
import pytest

from deepseek_jax.data.held_out import is_held_out, share, those_held_out
from deepseek_jax.data.row_fields import question_of
from deepseek_jax.posttraining.problems import TASKS
from deepseek_jax.posttraining.tasks import FORMS, problems, rows


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def sums(text):
    """Evaluates a chain of sums and differences from the left."""
    value, *rest = re.findall(r"[+-]?\d+", text.replace(" ", ""))
    return int(value) + sum(map(int, rest))


def product(text):
    a, b = numbers(text)
    return a * b


def recalled(text):
    return dict(re.findall(r"(\w)=(\d)", text))[text[-2]]


ORACLES = {
    "addition": lambda q: sum(numbers(q)),
    "subtraction": lambda q: sums(q.partition("=")[0]),
    "multiplication": product,
    "arithmetic": lambda q: sums(q.partition("=")[0]),
    "compare": lambda q: max(numbers(q)),
    "largest": lambda q: max(numbers(q)),
    "sort_digits": lambda q: " ".join(sorted(q.split()[1:])),
    "sort_words": lambda q: " ".join(sorted(q.split()[1:])),
    "reverse": lambda q: " ".join(reversed(q.split()[1:])),
    "recall": recalled,
    "count": lambda q: numbers(q)[1:].count(numbers(q)[0]),
}


@pytest.mark.parametrize("name", ORACLES)
def test_answers_are_right_at_every_size(name):
    for size in TASKS[name].sizes:
        found = problems(name, size, 5)
        assert found
        for problem in found:
            assert problem.answer == str(ORACLES[name](problem.question)), problem


@pytest.mark.parametrize("name", ["addition", "subtraction", "multiplication", "arithmetic"])
def test_each_step_of_the_work_is_true(name):
    for problem in problems(name, 4, 50):
        for step in problem.work.split(", "):
            left, right = step.split("=")
            assert eval(left) == int(right), problem  # of our own making: digits and signs
    assert problems("addition", 2, 1)[0].work.count("=") == 2


def test_the_work_of_an_addition_spells_the_answer():
    for problem in problems("addition", 3, 50):
        totals = [int(step.split("=")[1]) for step in problem.work.split(", ")]
        digits = [total % 10 for total in totals[:-1]]
        assert int(str(totals[-1]) + "".join(map(str, reversed(digits)))) == int(problem.answer)


def test_programs_pass_their_tests_and_fail_with_another_step():
    for problem in problems("program", 3, 20):
        space = {}
        exec(problem.answer, space)
        exec(problem.tests, space)
        assert problem.question.startswith("Write f(x): x ")
        exec(problem.answer.replace("return x", "return x + 1"), space)
        with pytest.raises(AssertionError):
            exec(problem.tests, space)


@pytest.mark.parametrize("name", TASKS)
def test_no_question_is_on_both_sides(name):
    """Whatever the seeds, and where all questions of a small task are asked."""
    train = {p.question for seed in range(2) for p in problems(name, TASKS[name].sizes[0], 60, False, seed)}
    held = {p.question for seed in range(2) for p in problems(name, TASKS[name].sizes[0], 60, True, seed)}
    assert train and held and not train & held
    assert all(is_held_out(q) for q in held) and not any(is_held_out(q) for q in train)


def test_a_tenth_is_held_out_and_a_smaller_fraction_is_a_part_of_it():
    questions = [f"{a} + {b} = ?" for a in range(100) for b in range(100)]
    found = sum(map(is_held_out, questions))
    assert abs(found - 1000) < 4 * (10_000 * 0.1 * 0.9) ** 0.5  # four standard deviations
    assert all(is_held_out(q) for q in questions if is_held_out(q, 0.05))
    assert share("7 + 8 = ?") == share(" 7 +\n8  = ?\n")  # white space does not count


def test_rows_are_of_the_seed_and_distinct():
    first = rows("tasks:addition/2/boxed/500", seed=3)
    assert first == rows("tasks:addition/2/boxed/500", seed=3) != rows("tasks:addition/2/boxed/500", seed=4)
    questions = Counter(row["prompt"][0]["content"] for row in first)
    assert len(questions) == 500 and max(questions.values()) == 1
    assert len(rows("tasks:addition/2/boxed/500", held_out=True)) == 50
    assert len(rows("tasks:compare/1")) + len(rows("tasks:compare/1", held_out=True)) == 9 * 8


def test_a_row_reads_as_prompt_and_completion_with_its_columns():
    (row,) = rows("tasks:compare/2/tagged/1")
    question, answer = row["prompt"][0]["content"], row["answer"]
    assert row["prompt"] == [{"role": "user", "content": question}]
    said = row["completion"][0]["content"]
    assert said.startswith("<think>") and said.endswith(f"</think><answer>{answer}</answer>")
    (row,) = rows("tasks:program/2/boxed/1")
    assert row["answer"] is None and row["completion"][0]["content"].startswith("```python\ndef f(x):\n")
    assert row["tests"].count("assert") == 3
    assert rows("tasks:addition/2/answer/1")[0]["completion"][0]["content"].startswith("\\boxed{")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("addition", "source 'addition' should be \"tasks:NAME[/SIZE][/FORM][/COUNT]\""),
        ("tasks:", 'should be "tasks:NAME'),
        ("tasks:adition", "'adition' is not one of .* did you mean 'addition'?"),
        ("tasks:addition/99", "addition counts digits: from 1 to 12, not 99"),
        ("tasks:addition/2/boxd", "'boxd' is not one of .* did you mean 'boxed'?"),
        ("tasks:addition/2/boxed/0", "should end with a positive count"),
        ("tasks:addition/2/boxed/5/7", "should end with a positive count"),
    ],
)
def test_a_wrong_source_is_one_line(source, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("?", r"\?").replace(".*", ".*")):
        rows(source)


def test_data_splits_questions_alike():
    """The share by which `data` holds out a row's question is the one by which a task does."""
    for row in rows("tasks:sort_words/20/boxed/5", held_out=True):
        assert is_held_out(question_of(row)) and question_of(row) == row["prompt"][0]["content"]


def test_every_task_and_form_has_rows():
    for name in TASKS:
        for form in FORMS:
            assert rows(f"tasks:{name}/{form}/5")


def test_rows_of_questions_that_nobody_holds_out_are_split_near_the_others():
    """Distilled rows ask training questions alone: a tenth of these, by their hash, is for validation; one at least, never all."""
    share_n = np.repeat(np.linspace(0.2, 0.9, 40), 3)
    found = {fraction: those_held_out(share_n, fraction) for fraction in (0.0, 0.1, 0.5, 1.0)}
    assert {fraction: len(set(share_n[out])) for fraction, out in found.items()} == {
        0.0: 1,
        0.1: 4,
        0.5: 17,
        1.0: 39,
    }
    assert all(share_n[out].max() < share_n[~out].min() for out in found.values())
    assert set(share_n[those_held_out(share_n, 0.3)]) == {share for share in share_n if share < 0.3}
    with pytest.raises(ValueError, match="all rows ask the same"):
        those_held_out(np.full(3, 0.5), 0.1)


def test_what_is_said_of_a_question_is_on_its_side():
    asked = {
        "prompt": [{"role": "user", "content": "Is 5 the answer to 2 + 3 = ?"}],
        "held_out_by": "2 + 3 = ?",
    }
    assert question_of(asked) == question_of({"prompt": [{"role": "user", "content": "2 + 3 = ?"}]})

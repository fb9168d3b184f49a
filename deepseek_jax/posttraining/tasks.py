"""Seeded generators of problems whose answers can be checked: text for fine-tuning and rollouts without a download.

    rows("tasks:addition/2")              # the training questions; held_out=True: the others
    rows("tasks:sort_words/3/tagged")     # three words, <think>...</think><answer>...</answer>

A source is `tasks:NAME[/SIZE][/FORM][/COUNT]`. SIZE says how hard it is (`TASKS`), FORM how an answer is written
(`FORMS`), COUNT how many distinct questions there are, those held out not counted. A row is

    {"prompt": [user], "completion": [assistant], "task": "addition", "answer": "82", "tests": None}

so that supervised training reads it as prompt and completion, and rollouts as a prompt with the columns that rewards
need. The completion is worked: a line of steps, then the answer. Which questions are held out, their hash decides
(`data/held_out.py`): the two sides are disjoint whatever seed, count or form each was made with.
"""

import random
from collections.abc import Callable
from typing import Any

from deepseek_jax.checks import choice, require, shown
from deepseek_jax.data.held_out import is_held_out
from deepseek_jax.posttraining.problems import TASKS, Problem

SCHEME = "tasks"
COUNT = 4000  # questions of a source that does not say how many
_HELD_OUT_SHARE = 10  # a source has a question held out for this many others
_IN_VAIN = 200  # draws without a new question, per question found, after which a task counts as exhausted

Row = dict[str, Any]


def rows(source: str, held_out: bool = False, seed: int = 0) -> list[Row]:
    """The rows of a source such as "tasks:addition/2", in an order that the seed decides.

    Args:
        held_out: the questions held out, a tenth as many, instead of those for training.
        seed: which questions, and their order; no seed moves a question from one side to the other.

    Returns distinct questions; fewer than asked for where the task has no more.

    Raises ValueError: no such task, size or form.
    """
    name, size, form, count = parsed(source)
    number = max(1, count // _HELD_OUT_SHARE) if held_out else count
    made = problems(name, size, number, held_out, seed)
    return [_row(name, problem, form) for problem in made]


def problems(name: str, size: int, count: int, held_out: bool = False, seed: int = 0) -> list[Problem]:
    """At most `count` problems of different questions of one side of the split."""
    draw = random.Random(f"{seed} {name} {size}")
    found: dict[str, Problem] = {}
    in_vain = 0  # draws since the last new question
    while len(found) < count and in_vain < _IN_VAIN * (len(found) + 10):
        problem = TASKS[name].make(draw, size)
        new = problem.question not in found and is_held_out(problem.question) == held_out
        in_vain = 0 if new else in_vain + 1
        if new:
            found[problem.question] = problem
    return list(found.values())


def parsed(source: str) -> tuple[str, int, str, int]:
    """Task, size, form and count that a source names."""
    scheme, _, path = source.partition(":")
    require(
        scheme == SCHEME and bool(path),
        f'source {shown(source)} should be "{SCHEME}:NAME[/SIZE][/FORM][/COUNT]", such as "{SCHEME}:addition/2"',
    )
    name, *rest = path.split("/")
    choice(f"the task of {shown(source)}", name, tuple(TASKS))
    task = TASKS[name]
    size = int(rest.pop(0)) if rest and rest[0].isdecimal() else task.usual
    require(
        size in task.sizes,
        f"{shown(source)}: {name} counts {task.what}: from {task.sizes[0]} to {task.sizes[-1]}, not {size}",
    )
    form = rest.pop(0) if rest and not rest[0].isdecimal() else next(iter(FORMS))
    choice(f"the form of {shown(source)}", form, tuple(FORMS))
    count = rest.pop(0) if rest else str(COUNT)
    require(
        not rest and count.isdecimal() and int(count) > 0,
        f"{shown(source)} should end with a positive count of questions, or before",
    )
    return name, size, form, int(count)


def _row(name: str, problem: Problem, form: str) -> Row:
    said = f"```python\n{problem.answer}\n```" if problem.tests else FORMS[form](problem)
    return {
        "prompt": [{"role": "user", "content": problem.question}],
        "completion": [{"role": "assistant", "content": said}],
        "task": name,
        "answer": None if problem.tests else problem.answer,
        "tests": problem.tests,
    }


# How a worked answer is written; the first where a source names none.
FORMS: dict[str, Callable[[Problem], str]] = {
    "boxed": lambda p: f"{p.work}. \\boxed{{{p.answer}}}",
    "tagged": lambda p: f"<think>{p.work}</think><answer>{p.answer}</answer>",
    "answer": lambda p: f"\\boxed{{{p.answer}}}",
}

"""Judgements with their reasons, as rows for supervised training: what makes a generative reward model of an SFT checkpoint
(report section 5.2.1: preference data "includes the chain-of-thought leading to the reward").

Two ways to write them, for answers whose truth is known: reasons from the problem's own worked answer, or, once a model judges at
all, its own judgements, as far as their verdicts are true.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from deepseek_jax.posttraining import judge_forms
from deepseek_jax.posttraining.asking import Ask
from deepseek_jax.posttraining.judge_forms import FORMS, HIGHEST, LOWEST, Form

Row = dict[str, Any]


class Case(NamedTuple):
    """An answer of known truth.

    Attributes:
        reference: the short answer that is right.
        worked: an answer that is right, with its steps.
        response: what is judged.
        right: whether it is.
    """

    question: str
    reference: str
    worked: str
    response: str
    right: bool


def reasons(case: Case) -> str:
    """What a good judge would write: the way to the answer, then what the response makes of it."""
    found = "reaches it" if case.right else "does not reach it"
    return f"{case.worked}\nThe answer is {case.reference}. The response {found}."


def worked(
    cases: Sequence[Case], form: str = "truth", write: Callable[[Case], str] = reasons
) -> Iterator[Row]:
    """A row of each case, its reasons by `write`. form: "reference", "truth" or "score"."""
    for case in cases:
        yield _row(
            case,
            _asked(FORMS[form], case),
            f"{write(case)}\n{judge_forms.verdict(FORMS[form], _truth(form, case))}",
        )


def paired(right: Case, wrong: Case, write: Callable[[Case], str] = reasons) -> Iterator[Row]:
    """Two rows of a right and a wrong answer to one question: each order, so that no place is learned."""
    for first, second in ((right, wrong), (wrong, right)):
        said = (
            f"The response {name} {'reaches' if case.right else 'does not reach'} it."
            for name, case in (("A", first), ("B", second))
        )
        texts = (right.question, first.response, second.response)
        scores = tuple(HIGHEST if case.right else LOWEST for case in (first, second))
        reason = f"{right.worked}\nThe answer is {right.reference}. {' '.join(said)}"
        yield _row(
            right,
            judge_forms.messages(FORMS["pair"], texts),
            f"{reason}\n{judge_forms.verdict(FORMS['pair'], scores)}",
        )


def pairs(cases: Sequence[Case]) -> list[tuple[Case, Case]]:
    """A right and a wrong answer of each question that has both, the first of each."""
    first: dict[tuple[str, bool], Case] = {}
    for case in cases:
        first.setdefault((case.question, case.right), case)
    rights = [case for (_, right), case in first.items() if right]
    return [(case, first[case.question, False]) for case in rights if (case.question, False) in first]


def agreeing(ask: Ask, cases: Sequence[Case], form: str = "truth", times: int = 4) -> Iterator[Row]:
    """Of each case the first of a model's own judgements whose verdict is the truth; nothing where none is."""
    asked = [_asked(FORMS[form], case) for case in cases]
    answers = ask([messages for messages in asked for _ in range(times)])
    for i, (case, messages) in enumerate(zip(cases, asked, strict=True)):
        own = answers[i * times : (i + 1) * times]
        true = (text for text in own if judge_forms.read(FORMS[form], text) == _truth(form, case))
        text = next(true, None)
        if text is not None:
            yield _row(case, messages, text)


def balanced(cases: Sequence[Case], seed: int = 0) -> list[Case]:
    """As many right as wrong ones, drawn, in their order: a judge that always says the same is right half of the times."""
    draw = random.Random(seed)
    sides = [[i for i, case in enumerate(cases) if case.right is right] for right in (True, False)]
    number = min(map(len, sides))
    return [cases[i] for i in sorted(i for side in sides for i in draw.sample(side, number))]


def texts_of(form: Form, case: Case) -> list[str]:
    """What a judge of this form is given of a case."""
    known = {"question": case.question, "reference": case.reference, "response": case.response}
    return [known[part] for part in form.parts]


def _asked(form: Form, case: Case) -> list[dict[str, str]]:
    return judge_forms.messages(form, texts_of(form, case))


def _truth(form: str, case: Case) -> Any:
    return case.right if form != "score" else float(HIGHEST if case.right else LOWEST)


def _row(case: Case, messages: list[dict[str, str]], said: str) -> Row:
    """All judgements of answers to a question are on its side of the split (`data/row_fields.py: question_of`)."""
    answer = [{"role": "assistant", "content": said}]
    return {"prompt": messages, "completion": answer, "held_out_by": case.question}

"""A model's judgement as a reward (report sections 5.2.1 and 5.4.2): with a reference or without, by principles, by votes.

The model may be a generative reward model, trained on judgements with their reasons (`posttraining/judgements.py`), or the policy
itself: whatever `Ask` asks.
"""

from collections.abc import Sequence
from typing import Any

from deepseek_jax.checks import choice, require
from deepseek_jax.posttraining import judge_forms
from deepseek_jax.posttraining.asking import Ask
from deepseek_jax.posttraining.judge_forms import FORMS, HIGHEST, LOWEST, REFERENCE, SCORE, Form, summary
from deepseek_jax.posttraining.rewards import texts
from deepseek_jax.posttraining.votes import majority, mean_score

Text = str | Sequence[Any]  # plain, or messages


class Judge:
    """`judge(prompts, completions, completion_ids, **columns)` -> rewards in [0, 1].

    Verdicts of yes and no: the majority of the votes, a tie is 0.5. Scores: their mean, from the lowest, 0, to the highest, 1.
    An answer of which no vote can be read gets 0, or a policy would be paid for answers that a judge cannot read. None where
    there is no reference. The same answer to the same question is judged once in a call, and alike in any call.

    Args:
        form: "reference", "truth" or "score" (`judge_forms.FORMS`).
        votes: judgements of each answer.
        principles: what to judge by.
        reads: "summary", the answer behind its reasoning, or "all" of it.
        column: the reference's.

    Attributes:
        asked, unread: votes so far, and how many of them had no verdict.
    """

    __name__ = "judge"

    def __init__(
        self,
        ask: Ask,
        form: str = "truth",
        votes: int = 1,
        principles: Sequence[str] = (),
        reads: str = "summary",
        column: str = "answer",
    ):
        choice("form", form, ("reference", "truth", "score"))
        require(votes >= 1, f"votes={votes} must be positive")
        self._ask, self._form, self._votes = ask, FORMS[form], votes
        self._principles, self._reads, self._column = tuple(principles), reads, column
        self.asked = self.unread = 0

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        references = columns.get(self._column) if self._form is REFERENCE else [""] * len(prompts)
        require(
            references is not None,
            f"a judge with a reference needs the column {self._column!r}, and there are {sorted(columns)}",
        )
        cases = [
            None if reference is None else self._case(prompt, completion, str(reference))
            for prompt, completion, reference in zip(prompts, completions, references or (), strict=True)
        ]
        different = list(dict.fromkeys(case for case in cases if case is not None))
        said = dict(zip(different, self._judged(different), strict=True))
        return [None if case is None else said[case] for case in cases]

    def _case(self, prompt: Text, completion: Text, reference: str) -> tuple[str, ...]:
        question, answer = question_of(prompt), summary(texts.text_of(completion), self._reads)
        return (question, reference, answer) if self._form is REFERENCE else (question, answer)

    def _judged(self, cases: Sequence[tuple[str, ...]]) -> list[float]:
        votes = polled(self._ask, self._form, cases, self._votes, self._principles)
        self.asked += len(cases) * self._votes
        self.unread += sum(vote is None for of_case in votes for vote in of_case)
        return [_reward(self._form, of_case) for of_case in votes]


def polled(
    ask: Ask, form: Form, cases: Sequence[Sequence[str]], votes: int, principles: Sequence[str] = ()
) -> list[list[Any]]:
    """The verdicts of so many judgements of each case, None where one cannot be read; in one call."""
    conversations = [judge_forms.messages(form, case, principles) for case in cases for _ in range(votes)]
    said = [judge_forms.read(form, text) for text in ask(conversations)]
    return [said[i : i + votes] for i in range(0, len(said), votes)]


def _reward(form: Form, votes: Sequence[Any]) -> float:
    if form is SCORE:
        mean = mean_score(votes)
        return 0.0 if mean is None else (mean - LOWEST) / (HIGHEST - LOWEST)
    return majority(votes) or 0.0


def question_of(prompt: Any) -> str:
    """A plain text as it is; of messages, the content of a single one, else each with its role before it."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)

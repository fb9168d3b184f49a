"""How a judge is asked, and how its judgement is read: reasoning first, the verdict in the last line.

Four forms: whether an answer matches a reference; whether it is right, without one; a score of 1 to 10; scores of two answers
(report sections 5.2.1 and 5.4.2; R1's preferences). Each line of what is judged is marked as quoted, so that no answer can go
on as if it were the judge's instructions.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from deepseek_jax.checks import choice, require
from deepseek_jax.posttraining.rewards import texts

Message = dict[str, str]
LOWEST, HIGHEST = 1, 10  # scores


class Form(NamedTuple):
    """What a judge is to do.

    Attributes:
        task: the instructions.
        parts: names of the texts that it is given, in their order; "Principles" among them where there are some.
        verdict: the word before the verdict.
        choices: what the verdict may be: "yes", "no", or one or two scores.
    """

    task: str
    parts: tuple[str, ...]
    verdict: str
    choices: str


_REASONS = "Give your reasons. The last line is"
REFERENCE = Form(
    f"Does the response reach the reference? {_REASONS} Verdict: yes or Verdict: no.",
    ("question", "reference", "response"),
    "Verdict",
    "yes or no",
)
TRUTH = Form(
    f"Is the response to the question right? {_REASONS} Verdict: yes or Verdict: no.",
    ("question", "response"),
    "Verdict",
    "yes or no",
)
SCORE = Form(
    f"How good is the response to the question? {_REASONS} Score: N, from {LOWEST} to {HIGHEST}.",
    ("question", "response"),
    "Score",
    "score",
)
PAIR = Form(
    f"How good are both responses to the question? {_REASONS} Scores: M N, of A and of B, each from {LOWEST} to "
    f"{HIGHEST}.",
    ("question", "response A", "response B"),
    "Scores",
    "scores",
)
FORMS = {"reference": REFERENCE, "truth": TRUTH, "score": SCORE, "pair": PAIR}


def messages(form: Form, texts: Sequence[str], principles: Sequence[str] = ()) -> list[Message]:
    """The prompt of a judge: one turn of the user, so that any chat template renders it.

    Args:
        texts: one for each of the form's parts.
        principles: what to judge by.
    """
    require(len(texts) == len(form.parts), f"{len(texts)} texts for the parts {list(form.parts)}")
    lines = [form.task]
    if principles:
        numbered = (f"{i}. {principle}" for i, principle in enumerate(principles, start=1))
        lines.append("Judge by these principles:\n" + "\n".join(numbered))
    lines += (_quoted(name, text) for name, text in zip(form.parts, texts, strict=True))
    return [{"role": "user", "content": "\n".join(lines)}]


def _quoted(name: str, text: str) -> str:
    """A text under its name, each line marked: none of them can be taken for another part, or for instructions."""
    return "\n".join((f"{name}:", *(f"> {line}" for line in text.splitlines() or [""])))


def read(form: Form, judgement: str) -> Any:
    """The verdict of a judgement: True or False, a score, or two scores; None where it gives none.

    The last line that begins with the verdict's word counts, for a judge may change its mind; lines that it quotes do not.
    """
    lines = rf"^[\s*_#`]*{form.verdict}[*_`]*:[\s*_`]*(.*?)[\s*_`.]*$"
    found = re.findall(lines, judgement, re.MULTILINE | re.IGNORECASE)
    if not found:
        return None
    said = found[-1].lower()
    if form.choices == "yes or no":
        return {"yes": True, "no": False}.get(said)
    scores = [float(x) for x in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?", said)]
    wanted = 1 if form.choices == "score" else 2
    good = len(scores) == wanted and all(LOWEST <= x <= HIGHEST for x in scores)
    return (scores[0] if wanted == 1 else (scores[0], scores[1])) if good else None


def verdict(form: Form, value: Any) -> str:
    """The last line of a judgement, as `read` reads it."""
    if form.choices == "yes or no":
        return f"{form.verdict}: {'yes' if value else 'no'}"
    scores = (value,) if form.choices == "score" else value
    return f"{form.verdict}: {' '.join(f'{x:g}' for x in scores)}"


def summary(text: str, reads: str = "summary") -> str:
    """What a judge reads of an answer: "all", or the "summary" behind its reasoning; an answer that never ends its
    reasoning has no summary."""
    choice("reads", reads, ("summary", "all"))
    return text if reads == "all" else (texts.said(text) or "").strip()

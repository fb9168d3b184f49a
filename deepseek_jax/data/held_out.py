"""Which questions are held out: a hash of the question decides, so that no seed, order, count or stage can mix them.

Whoever splits questions, of a file or of a generator, for fine-tuning, rollouts or distillation, asks here: what one
stage was tested on, no other has trained on.
"""

import hashlib

import numpy as np

from deepseek_jax.checks import require

FRACTION = 0.1  # of questions held out, unless a config says otherwise


def share(question: str) -> float:
    """The place in [0, 1) that the hash of a question's words gives it; white space between them does not count."""
    words = " ".join(question.split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big") / 2**48


def is_held_out(question: str, fraction: float = FRACTION) -> bool:
    """Whether the question is held out, if `fraction` of all are. What a smaller fraction holds out, a larger one does."""
    return share(question) < fraction


def those_held_out(share_n: np.ndarray, fraction: float) -> np.ndarray:
    """Which of the questions with these shares (float64 [n]) are held out: bool [n].

    Where none is, since the rows are of questions that others hold out none of, it is `fraction` of these questions, those nearest to
    the held-out ones, but one at least; and where all are, one stays. Raises ValueError: there is one question only.
    """
    questions = np.unique(share_n)
    require(
        len(questions) > 1, "all rows ask the same: no other is left for validation; give a validation file"
    )
    number = int((questions < fraction).sum()) or max(1, round(fraction * len(questions)))
    return share_n < questions[min(number, len(questions) - 1)]

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

    Where that leaves a side empty, the nearest question moves over. Raises ValueError: there is one question only.
    """
    low, high = share_n.min(), share_n.max()
    require(low < high, "all rows ask the same: no other is left for validation; give a validation file")
    return share_n < np.clip(fraction, np.nextafter(low, 1), high)

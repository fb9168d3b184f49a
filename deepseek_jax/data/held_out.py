"""Which questions are held out: a hash of the question decides, so that no seed, order, count or stage can mix them.

Whoever splits questions, of a file or of a generator, for fine-tuning, rollouts or distillation, asks here: what one
stage was tested on, no other has trained on.
"""

import hashlib

FRACTION = 0.1  # of questions held out, unless a config says otherwise


def share(question: str) -> float:
    """The place in [0, 1) that the hash of a question's words gives it; white space between them does not count."""
    words = " ".join(question.split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big") / 2**48


def is_held_out(question: str, fraction: float = FRACTION) -> bool:
    """Whether the question is held out, if `fraction` of all are. What a smaller fraction holds out, a larger one does."""
    return share(question) < fraction

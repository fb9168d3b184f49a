"""Log-probabilities of a prompt's tokens as bytes: float32 [m], then int32 ids and float32 values [m, k] of alternatives."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.serving.request import PromptToken


def packed_size(tokens: int, top: int | None) -> int:
    """Bytes; top: alternatives of each token, None where nothing was asked for."""
    return 0 if top is None else 4 * tokens * (1 + 2 * top)


def packed(prompt: Sequence[PromptToken], top: int | None) -> bytes:
    """Of the tokens but the first, which has none."""
    if top is None:
        return b""
    logprobs = np.array([token.logprob for token in prompt[1:]], "<f4")
    ids = np.array([[i for i, _ in token.top] for token in prompt[1:]], "<i4")
    values = np.array([[x for _, x in token.top] for token in prompt[1:]], "<f4")
    return b"".join(x.tobytes() for x in (logprobs, ids, values))


def unpacked(data: Any, prompt: Sequence[int], end: int, top: int | None) -> dict[int, PromptToken]:
    """Of tokens 1 to `end` of a prompt, by their positions, from `packed_size(end, top)` bytes."""
    if top is None:
        return {}
    logprobs = np.frombuffer(data, "<f4", end)
    ids = np.frombuffer(data, "<i4", end * top, 4 * end).reshape(end, top)
    values = np.frombuffer(data, "<f4", end * top, 4 * end * (1 + top)).reshape(end, top)
    return {
        i + 1: PromptToken(
            prompt[i + 1], float(logprobs[i]), list(zip(ids[i].tolist(), values[i].tolist(), strict=True))
        )
        for i in range(end)
    }

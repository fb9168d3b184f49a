"""What a program of a step is to compute, as its host writes it: arrays with a row for each sequence that takes part.

Dims: r row of a program, t token, n page of a sequence, w 32-bit word of the vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.serving.programs import AT_ONCE, Chunks, DecodeRows
from deepseek_jax.serving.steps import Chunk, Running


def decode_plan(rows: int, words: int) -> DecodeRows:
    """No row yet; host arrays."""
    none = np.full(rows, -1, np.int32)
    return DecodeRows(
        slot_r=none,
        page_r=none.copy(),
        index_r=np.zeros(rows, np.int32),
        masked_r=np.zeros(rows, bool),
        mask_rw=_no_mask(rows, words),
        answer_rt=np.full((rows, AT_ONCE), -1, np.int32),
    )


def chunk_plan(rows: int, tokens: int, pages_each: int, words: int) -> Chunks:
    """No row yet; host arrays."""

    def zeros(*shape: int, dtype: Any = np.int32) -> np.ndarray:
        return np.zeros(shape, dtype)

    return Chunks(
        np.full(rows, -1, np.int32),
        zeros(rows),
        zeros(rows, tokens),
        np.full((rows, tokens), -1, np.int32),
        zeros(rows),
        zeros(rows, dtype=bool),
        zeros(rows, dtype=bool),
        np.full(rows, -1, np.int32),
        zeros(rows, dtype=bool),
        zeros(rows, dtype=bool),
        _no_mask(rows, words),
        zeros(rows, pages_each),
    )


@functools.cache
def _no_mask(rows: int, words: int) -> jax.Array:
    """Everything may be drawn; on the device, since it is an argument of nearly all steps."""
    return jnp.full((rows, words), 2**32 - 1, jnp.uint32)


def put_chunk(plan: Chunks, i: int, chunk: Chunk) -> None:
    """Row i of a program is this chunk."""
    running, n = chunk.running, len(chunk.tokens)
    end = chunk.start + n
    plan.slot_r[i], plan.start_r[i], plan.new_r[i] = running.slot, chunk.start, n
    plan.tokens_rt[i, -n:] = chunk.tokens
    following = running.tokens[chunk.start + 1 : end + 1]
    plan.next_rt[i, plan.next_rt.shape[1] - n :][: len(following)] = following
    plan.samples_r[i] = chunk.samples
    plan.answer_r[i] = answers(running, end, 1)[0]
    plan.asks_r[i], plan.routes_r[i] = running.request.prompt_logprobs is not None, running.request.routes
    plan.table_rn[i, : len(running.pages)] = running.pages


def answers(running: Running, place: int, count: int) -> list[int]:
    """The tokens at this place of a sequence, and behind it, that are taken and not drawn (`Request.answer`); -1 for others."""
    request, found = running.request, [-1] * count
    if request.answer is not None and place >= len(request.prompt):
        first = place - len(request.prompt)
        known = list(request.answer[first : first + count])
        found[: len(known)] = known
    return found

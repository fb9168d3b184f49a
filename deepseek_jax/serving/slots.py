"""What the requests that have a slot of the engine ask of sampling: arrays with one entry per slot, on the device.

With 64 slots and 129,280 ids they take 43 MB: 33 of them for the counts, 8 for the tokens of prompts, 1 for stop ids.

Dims: s slot, v vocabulary, w its 32-bit words, m biased id.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.id_sets import words
from deepseek_jax.model.platform import on_cpu
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import ALL, GREEDY, MOST_BIASES, asked_for, plain_numbers

Array = Any  # jax.Array in programs, NumPy's on the host


class Slots(NamedTuple):
    """Settings [s] of the requests, and what they have said so far.

    most_s: GREEDY to ALL, the most that the request asks for. seed_s uint32. top_s: alternatives of each token. kept_s:
    whether to say what could be drawn. bias_id_sm, bias_sm: filled up with the id v. free_from_s: from this position on the ids of stop_sw, one bit each, may be drawn.
    seen_sv bool: tokens of the prompt; count_sv int32: how often the answer has each token.
    """

    temperature_s: Array
    top_p_s: Array
    top_k_s: Array
    min_p_s: Array
    repetition_s: Array
    frequency_s: Array
    presence_s: Array
    most_s: Array
    seed_s: Array
    top_s: Array
    kept_s: Array
    free_from_s: Array
    bias_id_sm: Array
    bias_sm: Array
    stop_sw: Array
    seen_sv: Array
    count_sv: Array


# The entries of one slot, on the host; the last three are None where the request does not ask for them.
Row = Slots


def empty_slots(slots: int, vocab: int) -> Slots:
    """Of greedy requests, on the device."""

    def of_all(value: float, dtype: Any = jnp.float32, *dims: int) -> jax.Array:
        return jnp.full((slots, *dims), value, dtype)

    return Slots(
        temperature_s=of_all(0),
        top_p_s=of_all(1),
        top_k_s=of_all(0, jnp.int32),
        min_p_s=of_all(0),
        repetition_s=of_all(1),
        frequency_s=of_all(0),
        presence_s=of_all(0),
        most_s=of_all(GREEDY, jnp.int32),
        seed_s=of_all(0, jnp.uint32),
        top_s=of_all(0, jnp.int32),
        kept_s=of_all(False, bool),
        free_from_s=of_all(0, jnp.int32),
        bias_id_sm=of_all(vocab, jnp.int32, min(vocab, MOST_BIASES)),
        bias_sm=of_all(0, jnp.float32, min(vocab, MOST_BIASES)),
        stop_sw=of_all(0, jnp.uint32, words(vocab)),
        seen_sv=of_all(False, bool, vocab),
        count_sv=of_all(0, jnp.int32, vocab),
    )


def of_request(request: Request, answer: Sequence[int], vocab: int) -> Row:
    """What `put` writes for a request that has the tokens of `answer` already."""
    sampling = request.sampling
    temperature, top_p, top_k, min_p, repetition = plain_numbers(sampling)
    most = min(vocab, MOST_BIASES)
    bias_id, bias = np.full(most, vocab, np.int32), np.zeros(most, np.float32)
    for m, (token, value) in enumerate(dict(sampling.logit_bias).items()):
        bias_id[m], bias[m] = token, value
    looks_back = _looks_back(request)
    stop, seen, count = _of_the_vocabulary(request, answer, vocab) if looks_back else (None, None, None)
    return Slots(
        temperature_s=np.float32(temperature),
        top_p_s=np.float32(top_p),
        top_k_s=np.int32(top_k),
        min_p_s=np.float32(min_p),
        repetition_s=np.float32(repetition),
        frequency_s=np.float32(sampling.frequency_penalty),
        presence_s=np.float32(sampling.presence_penalty),
        most_s=np.int32(_most_of(request)),
        seed_s=np.uint32(int(request.seed) % 2**32),
        top_s=np.int32(request.logprobs or 0),
        kept_s=np.bool_(request.kept),
        free_from_s=np.int32(len(request.prompt) + min(request.min_tokens, request.max_tokens)),
        bias_id_sm=bias_id,
        bias_sm=bias,
        stop_sw=stop,
        seen_sv=seen,
        count_sv=count,
    )


def _looks_back(request: Request) -> bool:
    """Whether what may come depends on the tokens so far, or on their number."""
    asked = request.sampling
    penalty = asked.repetition_penalty != 1 or asked.presence_penalty or asked.frequency_penalty
    return bool(penalty or request.min_tokens)


def _of_the_vocabulary(request: Request, answer: Sequence[int], vocab: int) -> tuple[Array, ...]:
    """Stop ids as bits, tokens of the prompt, and counts of the answer."""
    stops = np.zeros(32 * words(vocab), bool)
    stops[[token for token in request.stop_ids if 0 <= token < vocab]] = True
    seen = np.zeros(vocab, bool)
    seen[np.asarray(request.prompt)] = True
    count = np.bincount(np.asarray(answer, np.int64), minlength=vocab).astype(np.int32)
    return np.packbits(stops, bitorder="little").view("<u4"), seen, count


def put(slots: Slots, i: Array, row: Row) -> Slots:
    """The slots after slot i got a row. There are two programs of it: rows have the last three entries, or not."""
    filled = (jnp.zeros((), x.dtype) if new is None else new for x, new in zip(slots, row, strict=True))
    return Slots(*(x.at[i].set(new) for x, new in zip(slots, filled, strict=True)))


def most_of(requests: Iterable[Request]) -> int | None:
    """What a batch of these asks for at most, GREEDY to ALL. None on CPUs, where the program sees it itself."""
    return None if on_cpu() else max(map(_most_of, requests), default=GREEDY)


def _most_of(request: Request) -> int:
    more = _looks_back(request) or request.sampling.logit_bias or request.grammar
    told = request.logprobs or request.prompt_logprobs is not None or request.kept or request.routes
    return ALL if more or told else asked_for(request.sampling)

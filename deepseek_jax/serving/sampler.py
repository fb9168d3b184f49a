"""Choosing the next tokens of a batch whose rows ask for different things: settings as arrays, one entry per slot.

What is done to a row's logits, in this order:

1. `logit_bias` is added.
2. A grammar's mask, then the ban of stop ids (`min_tokens`): -inf for what may not come, and for ids that no tokenizer knows.
3. Repetition penalty (tokens of prompt and answer), then frequency and presence penalties (tokens of the answer).
4. Temperature, top-k, top-p, min-p (`inference/sampling.py`). A greedy row takes the likeliest of what 3 leaves.

1 to 3 are vLLM's, which has the two of step 2 before the bias (the same, since -inf stays) and penalties as OpenAI defines them;
4 is that of `transformers` (vLLM cuts by min-p before top-k). Log-probabilities are of the model's own logits, before all this.

Where ids are left out until none is left, the last ones left out stay: a mask that allows stop ids only goes before
`min_tokens`, and a mask without an id that the tokenizer knows is not heard (the grammar then refuses what is drawn).

What a row draws depends on its seed, its position and its logits alone: the key is fold_in(fold_in(key(seed), position), use).

A step pays for what its rows ask for: in branches of the program on CPUs, on GPUs in programs of which the host picks one
(`most`). With 64 slots and 129,280 ids the state takes 43 MB: 33 of them for the counts, 8 for the tokens of prompts.

Dims: s slot, b row of the batch, v vocabulary, w its 32-bit words, m biased id, k alternative.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.inference.sampling import (
    ALL,
    MOST_BIASES,
    RowSampling,
    asked_for,
    either,
    filtered_logits,
    keys_at,
    log_prob,
    penalised,
    plain_numbers,
    sample,
)
from deepseek_jax.model.decoding import on_cpu
from deepseek_jax.serving.request import TOP, Request

Array = Any  # jax.Array in programs, NumPy's on the host


class Slots(NamedTuple):
    """Settings [s] of the requests that have a slot, and what they have said so far.

    seed_s uint32. top_s: alternatives asked for. bias_id_sm, bias_sm: filled up with the id v. free_from_s: from this
    position on the ids of stop_sw, one bit each, may be drawn. seen_sv bool: tokens of the prompt; count_sv int32: how often
    the answer has a token.
    """

    temperature_s: Array
    top_p_s: Array
    top_k_s: Array
    min_p_s: Array
    repetition_s: Array
    frequency_s: Array
    presence_s: Array
    seed_s: Array
    top_s: Array
    free_from_s: Array
    bias_id_sm: Array
    bias_sm: Array
    stop_sw: Array
    seen_sv: Array
    count_sv: Array


Row = (
    Slots  # the entries of one slot, on the host; the last three None where the request does not ask for them
)


def words(vocab: int) -> int:
    """32-bit words with a bit for each id."""
    return -(-vocab // 32)


def empty_slots(slots: int, vocab: int) -> Slots:
    """Greedy ones, on the device."""

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
        seed_s=of_all(0, jnp.uint32),
        top_s=of_all(0, jnp.int32),
        free_from_s=of_all(0, jnp.int32),
        bias_id_sm=of_all(vocab, jnp.int32, MOST_BIASES),
        bias_sm=of_all(0, jnp.float32, MOST_BIASES),
        stop_sw=of_all(0, jnp.uint32, words(vocab)),
        seen_sv=of_all(False, bool, vocab),
        count_sv=of_all(0, jnp.int32, vocab),
    )


def of_request(request: Request, answer: Sequence[int], vocab: int) -> Row:
    """What `put` writes for a request that has the tokens of `answer` already."""
    sampling = request.sampling
    temperature, top_p, top_k, min_p, repetition = plain_numbers(sampling)
    bias_id, bias = np.full(MOST_BIASES, vocab, np.int32), np.zeros(MOST_BIASES, np.float32)
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
        seed_s=np.uint32(int(request.seed) % 2**32),
        top_s=np.int32(request.logprobs or 0),
        free_from_s=np.int32(len(request.prompt) + request.min_tokens),
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
    """The slots after slot i got a row."""
    return Slots(
        *(
            x.at[i].set(jnp.zeros((), x.dtype) if new is None else new)
            for x, new in zip(slots, row, strict=True)
        )
    )


def most_of(requests: Iterable[Request]) -> int | None:
    """`most` of a batch of these: what they ask for at most. None on CPUs, where the program sees it itself."""
    return None if on_cpu() else max(map(_most_of, requests), default=0)


def _most_of(request: Request) -> int:
    more = _looks_back(request) or request.sampling.logit_bias or request.grammar
    tops = request.logprobs or request.prompt_logprobs is not None
    return ALL if more or tops else asked_for(request.sampling)


# --- on the device ------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of a batch: a row is one position of one slot.

    Attributes:
        slot_b: int32.
        position_b: int32; the position that the drawn token will have in its sequence.
        counted_b: bool; other rows only fill the batch.
        mask_bw: uint32, a bit for each id that may come; None: all.
        num_ids: ids from here on are never drawn; None: there are none.
        masked_b: bool; the other rows' masks are not heard; None: all are.
        after_b: int32; one more token of the answer, which the slot does not count (a draft), or -1; None: of no row.
        most: what the rows ask for at most, GREEDY to ALL; None: the program sees it itself.
    """

    slot_b: Array
    position_b: Array
    counted_b: Array
    mask_bw: Array | None = None
    num_ids: Array | None = None
    masked_b: Array | None = None
    after_b: Array | None = None
    most: int | None = None

    def ask(self, asked_b: jax.Array) -> Any:
        """Whether a row that counts asks for something that ALL has only."""
        return (asked_b & self.counted_b).any() if self.most is None else self.most >= ALL


def row_settings(slots: Slots, rows: Rows) -> RowSampling:
    """Settings of the rows; those that do not count are greedy."""
    at = rows.slot_b
    return RowSampling(
        temperature_b=jnp.where(rows.counted_b, slots.temperature_s[at], 0.0),
        top_p_b=jnp.where(rows.counted_b, slots.top_p_s[at], 1.0),
        top_k_b=jnp.where(rows.counted_b, slots.top_k_s[at], 0),
        min_p_b=jnp.where(rows.counted_b, slots.min_p_s[at], 0.0),
        penalty_b=slots.repetition_s[at],
        key_b=jax.vmap(jax.random.key)(slots.seed_s[at]),
        most=rows.most,
    )


def adjusted(slots: Slots, rows: Rows, logits_bv: jax.Array) -> jax.Array:
    """Logits after bias, mask, ban and penalties, float32; -inf for what may not be drawn, never for all ids of a row.

    `filtered_logits(adjusted(...), row_settings(...))` are logits of the distribution that is drawn from.
    """
    x_bv = _biased(slots, rows, logits_bv.astype(jnp.float32))
    if rows.num_ids is not None:
        x_bv = jnp.where((jnp.arange(x_bv.shape[1]) < rows.num_ids)[None], x_bv, -jnp.inf)
    if rows.mask_bw is not None:
        x_bv = _masked(rows, rows.mask_bw, x_bv)
    return _penalised(slots, rows, _with_ban(slots, rows, x_bv))


def _masked(rows: Rows, mask_bw: Array, logits_bv: jax.Array) -> jax.Array:
    if rows.masked_b is None:
        return _without(logits_bv, ~unpacked(mask_bw, logits_bv.shape[1]))
    heard_b1 = rows.masked_b[:, None]

    def masked(x_bv: jax.Array) -> jax.Array:
        return _without(x_bv, heard_b1 & ~unpacked(mask_bw, x_bv.shape[1]))

    return either(rows.ask(rows.masked_b), masked, lambda x: x, logits_bv)


def _biased(slots: Slots, rows: Rows, logits_bv: jax.Array) -> jax.Array:
    id_bm, bias_bm = slots.bias_id_sm[rows.slot_b], slots.bias_sm[rows.slot_b]

    def biased(x_bv: jax.Array) -> jax.Array:
        return x_bv.at[jnp.arange(len(x_bv))[:, None], id_bm].add(bias_bm, mode="drop")

    return either(rows.ask(id_bm[:, 0] < logits_bv.shape[1]), biased, lambda x: x, logits_bv)


def _with_ban(slots: Slots, rows: Rows, logits_bv: jax.Array) -> jax.Array:
    early_b = rows.position_b < slots.free_from_s[rows.slot_b]

    def banned(x_bv: jax.Array) -> jax.Array:
        return _without(x_bv, early_b[:, None] & unpacked(slots.stop_sw[rows.slot_b], x_bv.shape[1]))

    return either(rows.ask(early_b), banned, lambda x: x, logits_bv)


def _without(logits_bv: jax.Array, out_bv: jax.Array) -> jax.Array:
    """-inf for some ids, but in rows where nothing would be left."""
    left_bv = jnp.where(out_bv, -jnp.inf, logits_bv)
    return jnp.where((left_bv > -jnp.inf).any(axis=-1, keepdims=True), left_bv, logits_bv)


def _penalised(slots: Slots, rows: Rows, logits_bv: jax.Array) -> jax.Array:
    settings = row_settings(slots, rows)
    frequency_b, presence_b = slots.frequency_s[rows.slot_b], slots.presence_s[rows.slot_b]

    def changed(x_bv: jax.Array) -> jax.Array:
        count_bv = _counts(slots, rows)
        x_bv = penalised(x_bv, slots.seen_sv[rows.slot_b] | (count_bv > 0), settings)
        return x_bv - frequency_b[:, None] * count_bv - presence_b[:, None] * (count_bv > 0)

    asked_b = (settings.penalty_b != 1) | (frequency_b != 0) | (presence_b != 0)
    return either(rows.ask(asked_b), changed, lambda x: x, logits_bv)


def _counts(slots: Slots, rows: Rows) -> jax.Array:
    """How often the answers have each token [b, v]."""
    count_bv = slots.count_sv[rows.slot_b]
    if rows.after_b is None:
        return count_bv
    b, v = count_bv.shape
    return count_bv.at[jnp.arange(b), jnp.where(rows.after_b < 0, v, rows.after_b)].add(1, mode="drop")


def count(slots: Slots, rows: Rows, token_b: jax.Array) -> Slots:
    """The slots after their answers got a token of each row that counts; a slot may have several."""
    slot_b = jnp.where(rows.counted_b, rows.slot_b, len(slots.count_sv))
    return slots._replace(count_sv=slots.count_sv.at[slot_b, token_b].add(1, mode="drop"))


def unpacked(mask_bw: jax.Array, v: int) -> jax.Array:
    """A bit mask as bool [b, v]."""
    bits = (mask_bw[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    return bits.reshape(len(mask_bw), -1)[:, :v].astype(bool)


def packed(mask_bv: jax.Array) -> jax.Array:
    """A bool mask as bits, uint32 [b, w]."""
    b, v = mask_bv.shape
    bits = jnp.pad(mask_bv, ((0, 0), (0, -v % 32))).reshape(b, -1, 32).astype(jnp.uint32)
    return (bits << jnp.arange(32, dtype=jnp.uint32)[None, None]).sum(axis=-1, dtype=jnp.uint32)


class Drawn(NamedTuple):
    """One token of each row.

    token_b int32. logprob_b: nats, in the model's own distribution; sampled_b: in the one that it was drawn from, 0 where that
    is greedy. top_ids_bk, top_logprobs_bk: the TOP likeliest of the model's own, zeros if no row asks; of fewer ids, the last
    have -inf. kept_bw uint32: a bit for each id that could be drawn, if asked for.
    """

    token_b: jax.Array
    logprob_b: jax.Array
    sampled_b: jax.Array
    top_ids_bk: jax.Array
    top_logprobs_bk: jax.Array
    kept_bw: jax.Array | None = None


def draw(
    slots: Slots,
    slot_b: Array,
    logits_bv: jax.Array,
    position_b: Array,
    counted_b: Array,
    mask_bw: Array | None = None,
    num_ids: Array | None = None,
    masked_b: Array | None = None,
    most: int | None = None,
    keep: bool = False,
) -> tuple[Slots, Drawn]:
    """One token of each row; for the arguments see `Rows`. A row may not share its slot. keep: say what could be drawn."""
    rows = Rows(slot_b, position_b, counted_b, mask_bw, num_ids, masked_b, None, most)
    logits_bv = logits_bv.astype(jnp.float32)
    settings, x_bv = row_settings(slots, rows), adjusted(slots, rows, logits_bv)
    token_b, sampled_b = sample(keys_at(settings, position_b), x_bv, settings)
    kept_bw = packed(filtered_logits(x_bv, settings) > -jnp.inf) if keep else None
    drawn = Drawn(
        token_b, log_prob(logits_bv, token_b), sampled_b, *alternatives(slots, rows, logits_bv), kept_bw
    )
    return count(slots, rows, token_b), drawn


def alternatives(slots: Slots, rows: Rows, logits_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest ids [b, TOP] and their log-probabilities, if a row asks; else zeros. Ids from num_ids on are not named."""

    def found(x_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
        named = None if rows.num_ids is None else (jnp.arange(x_bv.shape[1]) < rows.num_ids)[None]
        return likeliest(x_bv, TOP, named)

    def none(x_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((len(x_bv), TOP), jnp.int32), jnp.zeros((len(x_bv), TOP), jnp.float32)

    return either(rows.ask(slots.top_s[rows.slot_b] > 0), found, none, logits_bv)


def likeliest(logits_bv: jax.Array, k: int, named_bv: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The k likeliest ids int32 [b, k], of those named, and their log-probabilities float32 [b, k]; of fewer ids than k, 0 and
    -inf follow."""
    logits_bv = logits_bv.astype(jnp.float32)
    among = logits_bv if named_bv is None else jnp.where(named_bv, logits_bv, -jnp.inf)
    top, ids = jax.lax.top_k(among, min(k, logits_bv.shape[1]))
    fill = ((0, 0), (0, k - ids.shape[1]))
    logprob = top - jax.nn.logsumexp(logits_bv, axis=-1, keepdims=True)
    return jnp.pad(ids.astype(jnp.int32), fill), jnp.pad(logprob, fill, constant_values=-jnp.inf)


def given(logits_bv: jax.Array, token_b: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of given tokens float32 [b], and the k likeliest ids [b, k] with theirs, in the model's own
    distribution."""
    return log_prob(logits_bv.astype(jnp.float32), token_b), *likeliest(logits_bv, k)

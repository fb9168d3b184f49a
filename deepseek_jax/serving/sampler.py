"""Choosing the next tokens of a batch whose rows ask for different things, and their log-probabilities.

What is done to a row's logits, in this order:

1. `logit_bias` is added.
2. -inf for ids that no tokenizer knows, for what a grammar's mask leaves out, and for stop ids before `min_tokens`.
3. Repetition penalty (tokens of prompt and answer), then frequency and presence penalties (tokens of the answer).
4. Temperature, top-k, top-p, min-p (`serving/sampling.py`). A greedy row takes the likeliest of what 3 leaves.

1 to 3 are vLLM's (which does 2 before 1: the same, since -inf stays), the penalties OpenAI's; 4 is that of `transformers` (vLLM
cuts by min-p before top-k). Log-probabilities are of the model's own logits, before all this.

A step that would leave no id to a row is left out: a mask with stop ids alone goes before `min_tokens`, and a mask without
an id that the tokenizer knows is not heard; the grammar then refuses what was drawn.

What a row draws depends on its seed, its position and its logits alone: the key is fold_in(fold_in(key(seed), position), use).

A row pays for what it asks for. On CPUs the program branches row by row (`each_row`). On GPUs, where the host would wait for
branches, it picks the program for what the rows ask for at most (`slots.py: most_of`).

Dims: s slot, b row of the batch, v vocabulary, w its 32-bit words, m biased id, k alternative.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.id_sets import packed, unpacked, words
from deepseek_jax.serving.request import TOP
from deepseek_jax.serving.sampling import (
    ALL,
    DRAWN,
    RowSampling,
    best_token,
    either,
    filtered_logits,
    keys_at,
    log_prob,
    penalised,
    sample,
)
from deepseek_jax.serving.slots import (
    Row,
    Slots,
    empty_slots,
    most_of,
    of_request,
    put,
)

__all__ = [
    "Drawn",
    "Row",
    "Rows",
    "Slots",
    "adjusted",
    "count",
    "draw",
    "each_row",
    "empty_slots",
    "given",
    "most_of",
    "of_request",
    "put",
    "row_settings",
]

Array = Any  # jax.Array in programs, NumPy's on the host


class Rows(NamedTuple):
    """Rows of a batch: a row is one position of one slot.

    Attributes:
        slot_b: int32.
        position_b: int32; the position that the drawn token will have in its sequence.
        counted_b: bool; other rows only fill the batch.
        mask_bw: uint32, a bit for each id that may come; None: all.
        num_ids: ids from here on are never drawn; None: there are none.
        masked_b: bool; the masks of other rows are not heard; None: all are.
        most: what the rows ask for at most, GREEDY to ALL; None: the program sees it itself.
        answer_b: the tokens that are taken instead of drawn ones; -1: one is drawn. None: in all rows.
    """

    slot_b: Array
    position_b: Array
    counted_b: Array
    mask_bw: Array | None = None
    num_ids: Array | None = None
    masked_b: Array | None = None
    most: int | None = None
    answer_b: Array | None = None

    def ask(self, slots: Slots, what: int) -> Any:
        """Whether a row that counts asks for `what` or more: bool, or an array where the host does not know."""
        if self.most is not None:
            return self.most >= what
        return ((slots.most_s[self.slot_b] >= what) & self.counted_b).any()

    def change(self, changed_b: jax.Array) -> Any:
        """The same of one of those things for which ALL stands, by what the rows ask for."""
        return (changed_b & self.counted_b).any() if self.most is None else self.most >= ALL


def each_row(f: Callable[..., Any], rows: Rows, *arrays_b: Any) -> Any:
    """f(rows, *arrays_b), of arrays [b, ...]; where the program branches, row by row, as batches of one."""
    if rows.most is not None:
        return f(rows, *arrays_b)

    def one(xs: Any) -> Any:
        row, *arrays = jax.tree.map(lambda x: x[None], xs)
        return jax.tree.map(lambda y: y[0], f(row._replace(num_ids=rows.num_ids), *arrays))

    return lax.map(one, (rows._replace(num_ids=None), *arrays_b))


# --- the distribution that is drawn from ----------------------------------------------------------------------------


def row_settings(slots: Slots, rows: Rows) -> RowSampling:
    """Temperature, top-k, top-p, min-p, repetition penalty and key of each row; one that does not count is greedy."""
    at = rows.slot_b
    return RowSampling(
        temperature_b=jnp.where(rows.counted_b, slots.temperature_s[at], 0.0),
        top_p_b=slots.top_p_s[at],
        top_k_b=slots.top_k_s[at],
        min_p_b=slots.min_p_s[at],
        penalty_b=slots.repetition_s[at],
        key_b=jax.vmap(jax.random.key)(slots.seed_s[at]),
        most=rows.most,
    )


def adjusted(slots: Slots, rows: Rows, settings: RowSampling, logits_bv: jax.Array) -> jax.Array:
    """Logits after steps 1 to 3, float32; -inf for what may not be drawn, which is never a whole row."""
    x_bv = allowed(rows, _biased(slots, rows, logits_bv.astype(jnp.float32)))
    return _penalised(slots, rows, settings, _with_ban(slots, rows, x_bv))


def allowed(rows: Rows, logits_bv: jax.Array) -> jax.Array:
    """-inf for ids that no tokenizer knows, and for what the masks leave out."""
    v = logits_bv.shape[1]
    if rows.num_ids is not None:
        logits_bv = jnp.where((jnp.arange(v) < rows.num_ids)[None], logits_bv, -jnp.inf)
    mask_bw = rows.mask_bw
    if mask_bw is None:
        return logits_bv
    heard_b = jnp.ones(len(logits_bv), bool) if rows.masked_b is None else rows.masked_b

    def masked(x_bv: jax.Array) -> jax.Array:
        return _without(x_bv, heard_b[:, None] & ~unpacked(mask_bw, v))

    asked = True if rows.masked_b is None else rows.change(heard_b)
    return either(asked, masked, lambda x: x, logits_bv)


def _biased(slots: Slots, rows: Rows, logits_bv: jax.Array) -> jax.Array:
    def biased(x_bv: jax.Array) -> jax.Array:
        at = (jnp.arange(len(x_bv))[:, None], slots.bias_id_sm[rows.slot_b])
        return x_bv.at[at].add(slots.bias_sm[rows.slot_b], mode="drop")

    some_b = slots.bias_id_sm[rows.slot_b, 0] < logits_bv.shape[1]
    return either(rows.change(some_b), biased, lambda x: x, logits_bv)


def _with_ban(slots: Slots, rows: Rows, logits_bv: jax.Array) -> jax.Array:
    early_b = rows.position_b < slots.free_from_s[rows.slot_b]

    def banned(x_bv: jax.Array) -> jax.Array:
        return _without(x_bv, early_b[:, None] & unpacked(slots.stop_sw[rows.slot_b], x_bv.shape[1]))

    return either(rows.change(early_b), banned, lambda x: x, logits_bv)


def _without(logits_bv: jax.Array, out_bv: jax.Array) -> jax.Array:
    """-inf for some ids, but in rows where nothing would be left."""
    left_bv = jnp.where(out_bv, -jnp.inf, logits_bv)
    return jnp.where((left_bv > -jnp.inf).any(axis=-1, keepdims=True), left_bv, logits_bv)


def _penalised(slots: Slots, rows: Rows, settings: RowSampling, logits_bv: jax.Array) -> jax.Array:
    frequency_b, presence_b = slots.frequency_s[rows.slot_b], slots.presence_s[rows.slot_b]

    def changed(x_bv: jax.Array) -> jax.Array:
        count_bv = slots.count_sv[rows.slot_b]
        x_bv = penalised(x_bv, slots.seen_sv[rows.slot_b] | (count_bv > 0), settings)
        return x_bv - frequency_b[:, None] * count_bv - presence_b[:, None] * (count_bv > 0)

    asked_b = (settings.penalty_b != 1) | (frequency_b != 0) | (presence_b != 0)
    return either(rows.change(asked_b), changed, lambda x: x, logits_bv)


# --- drawing --------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """One token of each row.

    token_b int32. logprob_b: nats, in the model's own distribution; sampled_b: in the one that it was drawn from, 0 where that
    is greedy. top_ids_bk, top_logprobs_bk: the TOP likeliest of the model's own for rows that ask, else zeros; of fewer ids,
    the last have -inf. kept_bw uint32: a bit for each id that could be drawn, for rows that ask, else zeros. routes_blk int16:
    the experts of the MoE layers of the main model that the token went to whose state was drawn from (`programs.py`).
    """

    token_b: jax.Array
    logprob_b: jax.Array
    sampled_b: jax.Array
    top_ids_bk: jax.Array
    top_logprobs_bk: jax.Array
    kept_bw: Any
    routes_blk: Any = None


def draw(slots: Slots, rows: Rows, logits_bv: jax.Array) -> tuple[Slots, Drawn]:
    """One token of each row, and the slots whose answers have it."""
    logits_bv = logits_bv.astype(jnp.float32)
    as_asked = functools.partial(each_row, functools.partial(_as_asked, slots), rows)
    greedily = functools.partial(_greedily, rows)
    token_b, *others = either(rows.ask(slots, DRAWN), as_asked, greedily, logits_bv)
    return count(slots, rows, token_b), Drawn(token_b, log_prob(logits_bv, token_b), *others)


def _as_asked(slots: Slots, rows: Rows, logits_bv: jax.Array) -> tuple[Any, ...]:
    """`Drawn` without logprob_b."""
    settings = row_settings(slots, rows)
    x_bv = adjusted(slots, rows, settings, logits_bv)
    token_b, sampled_b = sample(keys_at(settings, rows.position_b), x_bv, settings, rows.answer_b)
    some_b = slots.kept_s[rows.slot_b]
    kept_bw = either(rows.change(some_b), functools.partial(_kept, settings), _none_kept, x_bv)
    return token_b, sampled_b, *alternatives(slots, rows, logits_bv), kept_bw


def _greedily(rows: Rows, logits_bv: jax.Array) -> tuple[Any, ...]:
    """The same where no row asks for more."""
    token_b, sampled_b = best_token(allowed(rows, logits_bv), rows.answer_b)
    return token_b, sampled_b, *_no_alternatives(logits_bv), _none_kept(logits_bv)


def _kept(settings: RowSampling, adjusted_bv: jax.Array) -> jax.Array:
    return packed(filtered_logits(adjusted_bv, settings) > -jnp.inf)


def _none_kept(logits_bv: jax.Array) -> jax.Array:
    b, v = logits_bv.shape
    return jnp.zeros((b, words(v)), jnp.uint32)


def count(slots: Slots, rows: Rows, token_b: jax.Array) -> Slots:
    """The slots after their answers got a token of each row that counts; a slot may have several."""
    slot_b = jnp.where(rows.counted_b, rows.slot_b, len(slots.count_sv))
    return slots._replace(count_sv=slots.count_sv.at[slot_b, token_b].add(1, mode="drop"))


# --- log-probabilities ----------------------------------------------------------------------------------------------


def alternatives(slots: Slots, rows: Rows, logits_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest ids [b, TOP] and their log-probabilities, if a row asks."""
    found = functools.partial(likeliest, k=TOP, num_ids=rows.num_ids)
    return either(rows.change(slots.top_s[rows.slot_b] > 0), found, _no_alternatives, logits_bv)


def _no_alternatives(logits_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
    dims = (len(logits_bv), TOP)
    return jnp.zeros(dims, jnp.int32), jnp.zeros(dims, jnp.float32)


def likeliest(logits_bv: jax.Array, k: int, num_ids: Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The k likeliest ids int32 [b, k] and their log-probabilities float32 [b, k]; of fewer ids than k, 0 and -inf follow.
    Ids that no tokenizer knows, num_ids and up, take their part of the probability, but are not named."""
    logits_bv = logits_bv.astype(jnp.float32)
    v = logits_bv.shape[1]
    known = logits_bv if num_ids is None else jnp.where((jnp.arange(v) < num_ids)[None], logits_bv, -jnp.inf)
    top, ids = lax.top_k(known, min(k, v))
    fill = ((0, 0), (0, k - ids.shape[1]))
    logprob = top - jax.nn.logsumexp(logits_bv, axis=-1, keepdims=True)
    return jnp.pad(ids.astype(jnp.int32), fill), jnp.pad(logprob, fill, constant_values=-jnp.inf)


def given(
    logits_bv: jax.Array, token_b: jax.Array, k: int, num_ids: Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of given tokens float32 [b], and the k likeliest ids [b, k] with theirs, in the model's own
    distribution; see `likeliest`."""
    return log_prob(logits_bv.astype(jnp.float32), token_b), *likeliest(logits_bv, k, num_ids)

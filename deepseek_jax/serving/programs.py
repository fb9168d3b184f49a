"""What the engine keeps on the device, and the programs of a step: decode rows, and chunks of prompts.

The state has one entry per slot, in which a request stays while it runs. A program reads from small int32 arrays which slots
take part and where their tokens go, so that its shape, and so its compilation, depends on a few sizes alone; rows that only
fill it have slot -1, are written nowhere and go to no expert. A decode row reads its last token from the state: the host need
not know it. State and pages are consumed by each program and come back from it.

Both are pure functions of one device, and of each device of a mesh inside `shard_map` (`over_mesh.py`).

Dims: s slot, r row of a program, t token of a chunk, n page of a sequence, l layer, p page, w width, v vocabulary, k alternative.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.cache import empty_pages, paged_view
from deepseek_jax.model.decoding import Chosen, decode, mtp_append
from deepseek_jax.model.layers import logits
from deepseek_jax.model.layout import Layout
from deepseek_jax.serving.request import TOP
from deepseek_jax.serving.sampler import Drawn, Rows, Slots, draw, empty_slots, given
from deepseek_jax.serving.sampling import ALL

AT_ONCE = 8  # tokens of each row in one program, on a CPU
GIVEN_AT_ONCE = 64  # tokens of a prompt whose logits exist at the same time


class Weights(NamedTuple):
    """ready: parameters from `model.decoding.prepare`; bias_le: of the routers; num_ids: ids from there on are never drawn."""

    ready: Any
    bias_le: Any
    num_ids: Any


class State(NamedTuple):
    """Of one device.

    pages_lpsw: of `model.cache.empty_pages`. table_sn: the pages of each slot's sequence. length_s: tokens of it whose latents
    are in them. token_s: the last one drawn, which is not. slots: how each is sampled. h_sd: where the MTP module drafts
    (`drafting.py`), the main model's state of the last of length_s tokens; the module's latents are the last layer of the pages,
    and lack that token's. loads_le: where loads are counted, rows that went to each expert of each MoE layer, the MTP module's
    last.
    """

    pages_lpsw: jax.Array
    table_sn: jax.Array
    length_s: jax.Array
    token_s: jax.Array
    slots: Slots
    h_sd: Any = None
    loads_le: Any = None

    def loaded(self, counts_le: jax.Array, first: int = 0) -> Any:
        """`loads_le` with the rows of some more tokens, of the layers from `first` on."""
        if self.loads_le is None:
            return None
        return self.loads_le.at[first : first + len(counts_le)].add(counts_le)


def empty_state(
    cfg: ModelConfig,
    slots: int,
    pages: int,
    pages_each: int,
    fp8: bool = False,
    drafts: bool = False,
    loads: bool = False,
) -> State:
    """pages_each: of one sequence, at most. loads: whether loads of experts are counted."""
    zero = functools.partial(jnp.zeros, dtype=jnp.int32)
    return State(
        empty_pages(cfg, layers_in_pages(cfg, drafts), pages, fp8),
        zero((slots, pages_each)),
        zero(slots),
        zero(slots),
        empty_slots(slots, cfg.vocab_size),
        jnp.zeros((slots, cfg.hidden_size), cfg.dtype) if drafts else None,
        zero((cfg.num_moe_layers + min(1, cfg.num_nextn_predict_layers), cfg.n_routed_experts))
        if loads
        else None,
    )


def layers_in_pages(cfg: ModelConfig, drafts: bool) -> int:
    """The model's, and that of the module which drafts."""
    return cfg.num_hidden_layers + drafts


class DecodeRows(NamedTuple):
    """The next token of sequences. slot_r: -1 for no row; page_r: a page more of the sequence, -1 for none; index_r: which
    of its pages that is; mask_rw: ids that may be drawn, of rows whose masked_r is set (`request.Grammar`); answer_rt: tokens
    that are taken instead of drawn ones, of each of several times, -1 for none (`Request.answer`)."""

    slot_r: Any
    page_r: Any
    index_r: Any
    masked_r: Any
    mask_rw: Any
    answer_rt: Any


class Chunks(NamedTuple):
    """Tokens of prompts, one sequence in each row.

    slot_r: -1 for no row; start_r: tokens before the chunk; tokens_rt: padded on the left; next_rt: the token after each, -1
    where nobody knows it; new_r: tokens that are no padding; samples_r: whether the next token is drawn; asks_r: whether
    log-probabilities of next_rt are wanted; answer_r: the token that is taken instead of a drawn one, -1 for none; routes_r:
    whether the tokens' experts are wanted, for the host alone; table_rn: the pages of the sequence.
    """

    slot_r: Any
    start_r: Any
    tokens_rt: Any
    next_rt: Any
    new_r: Any
    samples_r: Any
    asks_r: Any
    answer_r: Any
    routes_r: Any
    masked_r: Any
    mask_rw: Any
    table_rn: Any


class Given(NamedTuple):
    """Log-probabilities of the tokens of a chunk, given those before: [r, t], and the likeliest ones [r, t, k]. routes_rtlk:
    experts that the tokens themselves went to, as `Drawn.routes_blk`."""

    logprob_rt: Any
    top_ids_rtk: Any
    top_logprobs_rtk: Any
    routes_rtlk: Any = None


# --- the programs -------------------------------------------------------------------------------------------------


def _there(slot_r: jax.Array, there_r: jax.Array, slots: int) -> jax.Array:
    """Slots to be written; those that are not there lie behind the last one, where nothing is written."""
    return jnp.where(there_r, slot_r, slots)


class Part(NamedTuple):
    """Decode rows that take part. slot_r, table_rn, token_r: of each, whatever they are where it is none; counted_r: whether
    it is one; length_r: tokens before the last, 0 where it is none."""

    slot_r: jax.Array
    counted_r: jax.Array
    table_rn: jax.Array
    length_r: jax.Array
    token_r: jax.Array

    def written(self, state: State, length_r: jax.Array, token_r: jax.Array, h_rd: jax.Array) -> State:
        """The state after a step: of each row its tokens in pages, the last token, the state of the one before."""
        write_r = _there(self.slot_r, self.counted_r, len(state.length_s))
        return state._replace(
            length_s=state.length_s.at[write_r].set(length_r, mode="drop"),
            token_s=state.token_s.at[write_r].set(token_r, mode="drop"),
            h_sd=None if state.h_sd is None else state.h_sd.at[write_r].set(h_rd, mode="drop"),
        )


def taking_part(state: State, rows: DecodeRows) -> tuple[State, Part]:
    """The state with the rows' new pages, and the rows."""
    slots, counted_r = len(state.length_s), rows.slot_r >= 0
    slot_r = jnp.maximum(rows.slot_r, 0)
    paged_r = _there(slot_r, counted_r & (rows.page_r >= 0), slots)
    table_sn = state.table_sn.at[paged_r, rows.index_r].set(rows.page_r, mode="drop")
    length_r = jnp.where(counted_r, state.length_s[slot_r], 0)
    part = Part(slot_r, counted_r, table_sn[slot_r], length_r, state.token_s[slot_r])
    return state._replace(table_sn=table_sn), part


def drawn_by(weights: Weights, part: Part, most: int | None) -> Callable[..., tuple[Slots, Drawn]]:
    """(slots, logits, positions, which rows count, whose masks and given tokens) -> the slots, and one token of each row."""

    def one(
        slots: Slots, logits_rv: jax.Array, position_r: jax.Array, counted_r: jax.Array, masks: Any = None
    ) -> tuple[Slots, Drawn]:
        rows = Rows(part.slot_r, position_r, counted_r, num_ids=weights.num_ids, most=most)
        if masks is not None:
            rows = rows._replace(
                masked_b=masks.masked_r, mask_bw=masks.mask_rw, answer_b=masks.answer_rt[:, 0]
            )
        return draw(slots, rows, logits_rv)

    return one


def decode_times(
    program: Callable[..., Any],
    weights: Weights,
    cfg: ModelConfig,
    layout: Layout,
    state: State,
    rows: DecodeRows,
    times: jax.Array | None,
    most: int | None,
) -> tuple[State, Any]:
    """A program of decode rows, `decode_rows` or `drafting.decode_pairs`, so many times, up to AT_ONCE; what was drawn has a
    leading axis of the times.

    None: once. On a CPU, whose host works on the cores that the model needs, several tokens at once take it less time; on
    GPUs the host would have to wait for such a loop.
    """

    @jax.jit  # traced once, for its shapes and in the loop
    def one(weights: Weights, state: State, rows: DecodeRows, i: Any) -> tuple[State, Any]:
        answer_rt = lax.dynamic_slice_in_dim(rows.answer_rt, i, 1, axis=1)
        return program(weights, cfg, layout, state, rows._replace(answer_rt=answer_rt), most)  # type: ignore[no-any-return]

    if times is None:
        state, drawn = one(weights, state, rows, 0)
        return state, jax.tree.map(lambda x: x[None], drawn)
    _, shapes = jax.eval_shape(one, weights, state, rows, jnp.int32(0))
    room = jax.tree.map(lambda x: jnp.zeros((AT_ONCE, *x.shape), x.dtype), shapes)

    def again(i: jax.Array, carry: tuple[State, Any]) -> tuple[State, Any]:
        state, drawn = one(weights, carry[0], rows, i)
        return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), carry[1], drawn)

    return lax.fori_loop(0, times, again, (state, room))


def decode_rows(
    weights: Weights, cfg: ModelConfig, layout: Layout, state: State, rows: DecodeRows, most: int | None
) -> tuple[State, Drawn]:
    """One token more of each row. most: what the rows ask for at most, where the host says so (`sampler.most_of`)."""
    state, part = taking_part(state, rows)
    ones_r, pages_lpsw = part.counted_r.astype(jnp.int32), state.pages_lpsw
    if state.h_sd is not None:
        last = state.h_sd[part.slot_r][:, None], part.token_r[:, None]
        before = paged_view(pages_lpsw, part.table_rn, part.length_r, 1, ones_r)
        pages_lpsw = mtp_append(weights.ready, cfg, *last, before, cfg.num_hidden_layers).pages_lpsw
    view = paged_view(pages_lpsw, part.table_rn, part.length_r + ones_r, 1, ones_r)
    h_rtd, view, chosen = decode(weights.ready, cfg, part.token_r[:, None], view, weights.bias_le, layout)
    draw_one = drawn_by(weights, part, most)
    logits_rv = logits(weights.ready, h_rtd[:, 0])
    slots, drawn = draw_one(state.slots, logits_rv, part.length_r + 1, part.counted_r, rows)
    drawn = with_routes(drawn, chosen, 0, most)
    loads_le = state.loaded(chosen.counts_le)
    state = state._replace(pages_lpsw=view.pages_lpsw, slots=slots, loads_le=loads_le)
    return part.written(state, part.length_r + 1, drawn.token_b, h_rtd[:, 0]), drawn


def routes(chosen: Chosen, most: int | None) -> jax.Array | None:
    """Of each token of a pass, int16 [r, t, l, k]; None where the host says that no row asks."""
    return None if most is not None and most < ALL else chosen.experts_btlk.astype(jnp.int16)


def with_routes(drawn: Drawn, chosen: Chosen, t: int, most: int | None) -> Drawn:
    """What was drawn from the state of token t of each row."""
    routes_rtlk = routes(chosen, most)
    return drawn._replace(routes_blk=None if routes_rtlk is None else routes_rtlk[:, t])


def prefill_chunks(
    weights: Weights, cfg: ModelConfig, layout: Layout, state: State, chunks: Chunks, most: int | None
) -> tuple[State, Drawn, Given]:
    """The latents of chunks; of a row that ends its prompt, the next token. most: as for `decode_rows`."""
    slots = len(state.length_s)
    counted_r = chunks.slot_r >= 0
    slot_r = jnp.maximum(chunks.slot_r, 0)
    write_r = _there(slot_r, counted_r, slots)
    samples_r = counted_r & chunks.samples_r
    length_r = jnp.where(counted_r, chunks.start_r + chunks.new_r, 0)
    new_r = jnp.where(counted_r, chunks.new_r, 0)
    t = chunks.tokens_rt.shape[1]
    view = paged_view(state.pages_lpsw, chunks.table_rn, length_r, t, new_r)
    h_rtd, view, chosen = decode(weights.ready, cfg, chunks.tokens_rt, view, weights.bias_le, layout)
    h_sd = None
    if state.h_sd is not None:
        h_sd = state.h_sd.at[write_r].set(h_rtd[:, -1], mode="drop")
        known = view._replace(positions_bt=jnp.where(chunks.next_rt < 0, -1, view.positions_bt))
        next_rt = jnp.maximum(chunks.next_rt, 0)
        view = mtp_append(weights.ready, cfg, h_rtd, next_rt, known, cfg.num_hidden_layers)
    asked = chunks.mask_rw, weights.num_ids, chunks.masked_r, most, chunks.answer_r
    rows = Rows(slot_r, length_r, samples_r, *asked)
    sampler, drawn = draw(state.slots, rows, logits(weights.ready, h_rtd[:, -1]))
    state = State(
        view.pages_lpsw,
        state.table_sn.at[write_r].set(chunks.table_rn, mode="drop"),
        state.length_s.at[write_r].set(length_r, mode="drop"),
        state.token_s.at[_there(slot_r, samples_r, slots)].set(drawn.token_b, mode="drop"),
        sampler,
        h_sd,
        state.loaded(chosen.counts_le),
    )
    given = _given(weights, h_rtd, chunks, most)._replace(routes_rtlk=routes(chosen, most))
    return state, with_routes(drawn, chosen, -1, most), given


def taken(pages_lpsw: jax.Array, page_n: jax.Array) -> jax.Array:
    """Some pages, [n, l, s, w]; those of -1 may be anything."""
    return jnp.moveaxis(pages_lpsw[:, jnp.maximum(page_n, 0)], 1, 0)


def brought(state: State, page_n: jax.Array, block_nlsw: jax.Array) -> State:
    """The state after pages of another server are written; those of -1 are none."""
    at_n = jnp.where(page_n < 0, state.pages_lpsw.shape[1], page_n)
    block_lnsw = jnp.moveaxis(block_nlsw, 0, 1)
    return state._replace(pages_lpsw=state.pages_lpsw.at[:, at_n].set(block_lnsw, mode="drop"))


def _given(weights: Weights, h_rtd: jax.Array, chunks: Chunks, most: int | None) -> Given:
    """What the next tokens of the chunks had for probabilities; zeros if no row asks."""
    r, t, d = h_rtd.shape
    some = next(n for n in range(min(GIVEN_AT_ONCE, r * t), 0, -1) if r * t % n == 0)

    def of_some(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        h_nd, next_n = xs
        return given(logits(weights.ready, h_nd), jnp.maximum(next_n, 0), TOP, weights.num_ids)

    def asked() -> Given:
        parts = lax.map(of_some, (h_rtd.reshape(-1, some, d), jnp.reshape(chunks.next_rt, (-1, some))))
        return Given(*(x.reshape(r, t, *x.shape[2:]) for x in parts))

    def nobody() -> Given:
        tops = (r, t, TOP)
        return Given(jnp.zeros((r, t), jnp.float32), jnp.zeros(tops, jnp.int32), jnp.zeros(tops, jnp.float32))

    if most is not None and most < ALL:
        return nobody()
    return lax.cond(jnp.any(chunks.asks_r), asked, nobody)

"""Speculative decoding with the MTP module (report sections 2.2 and 5.4.3).

Each step drafts one token with the MTP module and verifies it with the main model in one forward pass over two
tokens, so a step yields one token, or two if the draft is accepted.

A row's token is drawn from the main model's logits as without drafts, by the same key; the draft is drawn from the module's
logits by that key, too, and is accepted if it is the same token. So what comes out depends on no draft, bit for bit, greedy
or sampled, and a draft agrees as often as the module knows the main model's distribution: `jax.random.categorical` adds
the key's noise to the logits and takes the largest, and the same noise favours the same token (Gumbel coupling: Daliri, Musco
and Suresh 2024). Where p and q differ by the total variation D, at least (1 - D) / (1 + D) of the drafts are accepted; the
rule that accepts most (Leviathan et al. 2023), 1 - D, has texts depend on where drafts were made.

Rows advance at their own pace: each writes its own cache slots. With several MTP modules the first one drafts. Of tokens for
which it drafts nothing, its cache needs two projections alone.

Dims: b batch, t prompt token, s cache slot, n new token, v vocabulary, d hidden.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.batch import Batch, Choice, Prompts, emit, empty_output, is_stop
from deepseek_jax.inference.driver import State, advancing, grown, on_one_device
from deepseek_jax.inference.generate import choose, prompt_forward, with_seen
from deepseek_jax.model.cache import Apart, view_after_padding, with_room
from deepseek_jax.model.decoding import ONE_DEVICE, decode, mtp_append, mtp_decode
from deepseek_jax.model.layers import embed, logits
from deepseek_jax.model.layout import single_device
from deepseek_jax.model.mtp import mtp_latents
from deepseek_jax.model.rope import rope_table


class Stats(NamedTuple):
    """drafted: one token per row and forward pass of the main model; accepted: how many of them."""

    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """Share of drafts that were accepted (the report: 85-90%)."""
        return self.accepted / max(1, self.drafted)

    @property
    def tokens_per_step(self) -> float:
        """Of each row; a row's last step may keep one token fewer (stop token, max_new_tokens)."""
        return 1.0 + self.acceptance


def stats(state: State) -> Stats:
    """Of a generation that ended with this state."""
    return Stats(int(state.extra.drafted), int(state.extra.accepted))


class Draft(NamedTuple):
    """h_bd: the main model's state of the token before the last one, which the module joins with the last one to draft;
    cache: the module's own, of one layer; seen_bv: tokens of the row so far."""

    h_bd: jax.Array
    cache: Apart
    seen_bv: jax.Array
    drafted: jax.Array
    accepted: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg",))
def _prefill(params: Any, cfg: ModelConfig, prompts: Prompts, batch: Batch, bias_le: Any) -> State:
    h_btd, cache, positions, _ = prompt_forward(params, cfg, prompts, bias_le, single_device())
    out, seen_bv = empty_output(batch), jnp.asarray(prompts.seen_bv)
    choice = choose(logits(params, h_btd[:, -1]), seen_bv, out.count_b, batch)
    token_b, zero = choice.token_bk[:, 0], jnp.int32(0)
    # Of the last token, the first step writes the latents, before it drafts.
    next_btd = embed(params["embed"], cfg, jnp.roll(jnp.asarray(prompts.tokens_bt), -1, axis=1))
    p = jax.tree.map(lambda x: x[0], params["mtp"])
    own = Apart((mtp_latents(p, cfg, h_btd, next_btd, rope_table(cfg, positions)),))
    draft = Draft(h_btd[:, -1], own, with_seen(seen_bv, token_b), zero, zero)
    return State(emit(out, batch, choice, jnp.ones_like(token_b)), token_b, cache, draft, zero)


def step(ready: Any, cfg: ModelConfig, batch: Batch, bias_le: Any, state: State) -> State:
    """One token more of each row, or two."""
    draft, count_b = state.extra, state.out.count_b
    last_b = batch.length + count_b - 1  # where the last token goes

    own = view_after_padding(draft.cache, last_b - 1, 1, batch.pad_b)
    last = draft.h_bd[:, None], state.token_b[:, None]
    h_mtp, own = mtp_decode(ready, cfg, *last, own, bias_le, ONE_DEVICE)
    guess_b = choose(logits(ready, h_mtp[:, 0]), draft.seen_bv, count_b, batch).token_bk[:, 0]

    view = view_after_padding(state.cache, last_b, 2, batch.pad_b)
    pair_bt = jnp.stack([state.token_b, guess_b], axis=1)
    h_btd, view = decode(ready, cfg, pair_bt, view, bias_le, ONE_DEVICE)
    logits_btv = logits(ready, h_btd)
    one = choose(logits_btv[:, 0], draft.seen_bv, count_b, batch)
    one_b = one.token_bk[:, 0]
    seen_bv = with_seen(draft.seen_bv, one_b)
    two = choose(logits_btv[:, 1], seen_bv, count_b + 1, batch)
    accepted = guess_b == one_b
    both = accepted & ~is_stop(one_b, batch)

    own = view_after_padding(own.cache, last_b, 1, batch.pad_b)
    own = mtp_append(ready, cfg, h_btd[:, :1], one_b[:, None], own)
    token_b = jnp.where(both, two.token_bk[:, 0], one_b)
    running = ~state.out.done_b
    draft = Draft(
        jnp.where(both[:, None], h_btd[:, 1], h_btd[:, 0]),
        own.cache,
        with_seen(seen_bv, token_b),
        draft.drafted + running.sum(),
        draft.accepted + (running & accepted).sum(),
    )
    choice = Choice(*(jnp.concatenate(pair, axis=1) for pair in zip(one, two, strict=True)))
    out = emit(state.out, batch, choice, 1 + both.astype(jnp.int32))
    token_b = jnp.where(running, token_b, state.token_b)
    return state._replace(out=out, token_b=token_b, cache=view.cache, extra=draft)


@functools.partial(jax.jit, static_argnames=("cfg", "slots"))
def _grow(state: State, cfg: ModelConfig, slots: int) -> State:
    draft = state.extra
    cache = Apart((with_room(draft.cache.read(0), slots, cfg.dtype),))
    draft = draft._replace(cache=cache, h_bd=draft.h_bd.astype(cfg.dtype))
    return grown(state._replace(extra=draft), cfg, slots)


_advance = advancing(step)
speculative = on_one_device(_prefill, _grow, _advance, spare=2)


def check_speculative(cfg: ModelConfig) -> None:
    """Raises ValueError for a model that drafts nothing."""
    if not cfg.num_nextn_predict_layers:
        raise ValueError("speculative decoding drafts with the MTP module: num_nextn_predict_layers is 0")

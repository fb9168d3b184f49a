"""Speculative decoding with the MTP module (report sections 2.2 and 5.4.3).

Each step drafts one token with the MTP module and verifies it with the main model in one forward pass over two
tokens, so a step yields one token, or two if the draft is accepted. Greedy: accepted if it is the main model's
choice. Sampling: accepted with probability min(1, p/q), else the token is drawn from max(p - q, 0) normalised,
so the output follows the main model's distribution exactly (Leviathan et al. 2023).

Rows advance at their own pace: each writes its own cache slots. With several MTP modules the first one drafts. It reads a
long prompt whole, where the main model reads it in pieces (`generate.py: PIECE`).

Dims: b batch, t prompt token, s cache slot, n new token, v vocabulary, d hidden.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.batch import Batch, Choice, Prompts, allowed, emit, empty_output, is_stop
from deepseek_jax.inference.driver import State, advancing, grown, on_one_device
from deepseek_jax.inference.generate import choose, prompt_forward
from deepseek_jax.inference.sampling import (
    RowSampling,
    Sampling,
    filtered_logits,
    keys_at,
    log_prob,
    sample,
)
from deepseek_jax.model.cache import Apart, view_after_padding, with_room
from deepseek_jax.model.decoding import ONE_DEVICE, decode, mtp_decode
from deepseek_jax.model.layers import embed, logits
from deepseek_jax.model.layout import Context, single_device
from deepseek_jax.model.mtp import mtp_module
from deepseek_jax.model.rope import rope_table

# What a row draws for one token, apart from the token itself (0): the draft, its acceptance, its replacement.
DRAFT, ACCEPT, REPLACE = 1, 2, 3


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
    """logits_bv: of the MTP module for the token after the last; cache: the module's own, of one layer."""

    logits_bv: jax.Array
    cache: Apart
    drafted: jax.Array
    accepted: jax.Array


def verify(
    accept_key_b: jax.Array,
    replace_key_b: jax.Array,
    target_bv: jax.Array,
    draft_bv: jax.Array,
    token_b: jax.Array,
    sampling: RowSampling,
) -> tuple[jax.Array, jax.Array]:
    """(accepted bool [b], token int32 [b]): `token_b`, drawn from the draft's logits, or its replacement.

    A greedy row is a distribution at one point: its draft is accepted if it is the main model's choice.
    """
    p = jax.nn.softmax(filtered_logits(target_bv, sampling), axis=-1)
    q = jax.nn.softmax(filtered_logits(draft_bv, sampling), axis=-1)
    at = lambda prob: jnp.take_along_axis(prob, token_b[:, None], axis=-1)[:, 0]  # noqa: E731
    accepted = jax.vmap(jax.random.uniform)(accept_key_b) * at(q) < at(p)
    residual = jnp.log(jnp.maximum(p - q, 0.0))
    other = jax.vmap(jax.random.categorical)(replace_key_b, residual).astype(jnp.int32)
    return accepted, jnp.where(accepted, token_b, other)


@functools.partial(jax.jit, static_argnames=("cfg",))
def _prefill(params: Any, cfg: ModelConfig, prompts: Prompts, batch: Batch, bias_le: Any) -> State:
    layout = single_device()
    h_btd, cache, positions, segments = prompt_forward(params, cfg, prompts, bias_le, layout)
    out = empty_output(batch)
    choice = choose(logits(params, h_btd[:, -1]), jnp.asarray(prompts.seen_bv), out, batch)
    following = jnp.concatenate([jnp.asarray(prompts.tokens_bt)[:, 1:], choice.token_bk], axis=1)
    p = jax.tree.map(lambda x: x[0], params["mtp"])
    bias_e = None if bias_le is None else bias_le[cfg.num_moe_layers]
    ctx = Context(rope_table(cfg, positions), layout, segments, with_cache=True)
    _, out_btd, _, latent = mtp_module(p, cfg, h_btd, embed(params["embed"], cfg, following), bias_e, ctx)
    draft = Draft(logits(params, out_btd[:, -1]), Apart((latent,)), jnp.int32(0), jnp.int32(0))
    token_b, zero = choice.token_bk[:, 0], jnp.int32(0)
    return State(emit(out, batch, choice, jnp.ones_like(token_b)), token_b, cache, draft, zero)


def step(ready: Any, cfg: ModelConfig, batch: Batch, bias_le: Any, state: State) -> State:
    """One token more of each row, or two."""
    draft, sampling, count_b = state.extra, batch.sampling, state.out.count_b
    view = view_after_padding(state.cache, batch.length + count_b - 1, 2, batch.pad_b)

    guess_bv = allowed(draft.logits_bv, batch.num_ids)
    guess_b, _ = sample(keys_at(sampling, count_b, DRAFT), guess_bv, sampling)
    h_btd, view = decode(ready, cfg, jnp.stack([state.token_b, guess_b], axis=1), view, bias_le, ONE_DEVICE)
    raw_btv = logits(ready, h_btd)
    target_btv = allowed(raw_btv, batch.num_ids)

    accept_key, replace_key = (keys_at(sampling, count_b, use) for use in (ACCEPT, REPLACE))
    accepted, one = verify(accept_key, replace_key, target_btv[:, 0], guess_bv, guess_b, sampling)
    second, sampled_b = sample(keys_at(sampling, count_b + 1), target_btv[:, 1], sampling)
    both = accepted & ~is_stop(one, batch)
    following = jnp.stack([one, second], axis=1)
    choice = Choice(
        following,
        jax.vmap(log_prob, 1, 1)(raw_btv, following),
        jnp.stack([log_prob(filtered_logits(target_btv[:, 0], sampling), one), sampled_b], axis=1),
    )

    h_mtp, mtp_view = mtp_decode(
        ready, cfg, h_btd, following, view._replace(cache=draft.cache), bias_le, ONE_DEVICE
    )
    last = both.astype(jnp.int32)
    h_last = jnp.take_along_axis(h_mtp, last[:, None, None], axis=1)[:, 0]
    running = ~state.out.done_b
    draft = Draft(
        logits(ready, h_last),
        mtp_view.cache,
        draft.drafted + running.sum(),
        draft.accepted + (running & accepted).sum(),
    )
    out = emit(state.out, batch, choice, 1 + last)
    token_b = jnp.where(running, jnp.where(both, second, one), state.token_b)
    return state._replace(out=out, token_b=token_b, cache=view.cache, extra=draft)


@functools.partial(jax.jit, static_argnames=("cfg", "slots"))
def _grow(state: State, cfg: ModelConfig, slots: int) -> State:
    draft = state.extra
    cache = Apart((with_room(draft.cache.read(0), slots, cfg.dtype),))
    return grown(state._replace(extra=draft._replace(cache=cache)), cfg, slots)


_advance = advancing(step)
speculative = on_one_device(_prefill, _grow, _advance, spare=2)


def check_speculative(cfg: ModelConfig, sampling: Sampling) -> None:
    """Raises ValueError for what drafts do not go with."""
    if not cfg.num_nextn_predict_layers:
        raise ValueError("speculative decoding drafts with the MTP module: num_nextn_predict_layers is 0")
    if sampling.repetition_penalty != 1:
        raise ValueError(
            f"repetition_penalty={sampling.repetition_penalty} does not go with speculative decoding, whose second token "
            "depends on the first: leave out one of them"
        )

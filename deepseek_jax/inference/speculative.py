"""Speculative decoding with the MTP module (report sections 2.2 and 5.4.3).

Each step drafts one token with the MTP module and verifies it with the main model in one forward pass over two
tokens, so a step yields one token, or two if the draft is accepted. Greedy: accepted if it is the main model's
choice. Sampling: accepted with probability min(1, p/q), else the token is drawn from max(p - q, 0) normalised,
so the output follows the main model's distribution exactly (Leviathan et al. 2023).

Rows advance at their own pace: each writes its own cache slots. With several MTP modules the first one drafts.

Dims: b batch, t prompt token, s cache slot, n new token, v vocabulary, d hidden.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.cache import extend
from deepseek_jax.inference.generate import (
    BUCKET,
    Prompts,
    allowed,
    check_request,
    is_stop,
    pad_prompts,
    stop_array,
    until_stop,
)
from deepseek_jax.inference.sampling import Sampling, filtered_logits, sample
from deepseek_jax.model.decoding import decode, mtp_decode, prepare, prepare_cache
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.layers import embed, logits
from deepseek_jax.model.mla import LatentCache
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.transformer import Context, forward, mtp_module


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


class _State(NamedTuple):
    out_bn: jax.Array
    count_b: jax.Array  # tokens emitted
    token_b: jax.Array  # the last of them, not yet seen by the main model
    draft_bv: jax.Array  # logits of the MTP module for the token after it
    done_b: jax.Array
    cache: Any
    mtp_cache: LatentCache
    key: jax.Array
    drafted: jax.Array
    accepted: jax.Array


def verify(
    key: jax.Array, target_bv: jax.Array, draft_bv: jax.Array, token_b: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """(accepted bool [b], token int32 [b]): `token_b`, drawn from the draft's logits, or its replacement."""
    if sampling.greedy:
        choice = jnp.argmax(target_bv, axis=-1).astype(jnp.int32)
        return choice == token_b, choice
    p = jax.nn.softmax(filtered_logits(target_bv, sampling), axis=-1)
    q = jax.nn.softmax(filtered_logits(draft_bv, sampling), axis=-1)
    at = lambda prob: jnp.take_along_axis(prob, token_b[:, None], axis=-1)[:, 0]  # noqa: E731
    accept_key, residual_key = jax.random.split(key)
    accepted = jax.random.uniform(accept_key, token_b.shape) * at(q) < at(p)
    residual = jnp.maximum(p - q, 0.0)
    other = jax.random.categorical(residual_key, jnp.log(residual)).astype(jnp.int32)
    return accepted, jnp.where(accepted, token_b, other)


@functools.partial(jax.jit, static_argnames=("cfg", "slots", "sampling", "num_ids"))
def _prefill(
    params: Any,
    cfg: ModelConfig,
    prompts: Prompts,
    bias_le: Any,
    key: jax.Array,
    slots: int,
    sampling: Sampling,
    num_ids: int,
) -> tuple[jax.Array, jax.Array, LatentCache, LatentCache]:
    """First token [b], the draft's logits for the next [b, v], both caches."""
    tokens_bt, pad_b = prompts
    slot_bt = jnp.arange(tokens_bt.shape[1])[None] - pad_b[:, None]
    segments, positions = (slot_bt >= 0).astype(jnp.int32), jnp.maximum(slot_bt, 0)
    h_btd, aux = forward(params, cfg, tokens_bt, bias_le, positions, segments, mtp=False, with_cache=True)
    assert aux.cache is not None
    first_b = sample(key, allowed(logits(params, h_btd[:, -1]), num_ids), sampling)
    following = jnp.concatenate([tokens_bt[:, 1:], first_b[:, None]], axis=1)
    p = jax.tree.map(lambda x: x[0], params["mtp"])
    bias_e = None if bias_le is None else bias_le[cfg.num_moe_layers]
    ctx = Context(rope_table(cfg, positions), segments, "none", routed_experts, True)
    e_btd = embed(params["embed"], cfg, following)
    _, out_btd, _, latent = mtp_module(p, cfg, h_btd, e_btd, bias_e, ctx)
    mtp_cache = extend(jax.tree.map(lambda x: x[None], latent), slots)
    draft_bv = allowed(logits(params, out_btd[:, -1]), num_ids)
    return first_b, draft_bv, extend(aux.cache, slots), jax.tree.map(lambda x: x[0], mtp_cache)


@functools.partial(jax.jit, static_argnames=("cfg", "sampling", "new_tokens", "num_ids"))
def _loop(
    params: Any,
    cfg: ModelConfig,
    first_b: jax.Array,
    draft_bv: jax.Array,
    cache: LatentCache,
    mtp_cache: LatentCache,
    pad_b: jax.Array,
    start: jax.Array,
    bias_le: Any,
    stop_ids: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    new_tokens: int,
    num_ids: int,
) -> _State:
    slots = jnp.arange(cache.c_bsc.shape[2])
    two = jnp.arange(2)
    ready = prepare(params, cfg)

    def body(s: _State) -> _State:
        key, draft_key, verify_key, next_key = jax.random.split(s.key, 4)
        draft_b = sample(draft_key, s.draft_bv, sampling)
        slot_b = start + s.count_b - 1
        slot_bt = slot_b[:, None] + two
        mask = (slots <= slot_bt[..., None]) & (slots >= pad_b[:, None, None])
        positions = slot_bt - pad_b[:, None]
        tokens = jnp.stack([s.token_b, draft_b], axis=1)
        h_btd, cache = decode(ready, cfg, tokens, s.cache, slot_b, positions, mask, bias_le)
        target_btv = allowed(logits(params, h_btd), num_ids)
        accepted, one = verify(verify_key, target_btv[:, 0], s.draft_bv, draft_b, sampling)
        both = accepted & ~is_stop(one, stop_ids)
        second = sample(next_key, target_btv[:, 1], sampling)
        out = jax.vmap(lambda o, x, i: lax.dynamic_update_slice(o, x, (i,)))(
            s.out_bn, jnp.stack([one, second], axis=1), s.count_b
        )
        following = jnp.stack([one, second], axis=1)
        h_mtp, mtp_cache = mtp_decode(
            ready, cfg, h_btd, following, s.mtp_cache, slot_b, positions, mask, bias_le
        )
        last = jnp.where(both, 1, 0)
        draft_bv = allowed(
            logits(params, jnp.take_along_axis(h_mtp, last[:, None, None], axis=1)[:, 0]), num_ids
        )
        token = jnp.where(both, second, one)
        running = ~s.done_b
        count = s.count_b + jnp.where(running, 1 + last, 0)
        done = s.done_b | is_stop(token, stop_ids) | (count >= new_tokens)
        return _State(
            jnp.where(running[:, None], out, s.out_bn),
            count,
            jnp.where(running, token, s.token_b),
            draft_bv,
            done,
            cache,
            mtp_cache,
            key,
            s.drafted + running.sum(),
            s.accepted + (running & accepted).sum(),
        )

    b = first_b.shape[0]
    zero = jnp.int32(0)
    out = jnp.zeros((b, new_tokens + 2), jnp.int32).at[:, 0].set(first_b)
    done = is_stop(first_b, stop_ids) | (new_tokens <= 1)
    init = _State(
        out,
        jnp.ones((b,), jnp.int32),
        first_b,
        draft_bv,
        done,
        prepare_cache(cache, cfg),
        mtp_cache,
        key,
        zero,
        zero,
    )
    return lax.while_loop(lambda s: ~s.done_b.all(), body, init)


def generate_speculative(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    balance_bias: Any = None,
    sampling: Sampling = Sampling(),
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    num_ids: int | None = None,
) -> tuple[list[list[int]], Stats]:
    """As `generate`, with drafts from the MTP module. Greedy output is the same as without.

    Raises ValueError as `generate`, and for a model without MTP module.
    """
    if not cfg.num_nextn_predict_layers:
        raise ValueError("speculative decoding drafts with the MTP module: num_nextn_predict_layers is 0")
    check_request(cfg, prompts, max_new_tokens)
    padded = pad_prompts(prompts)
    length = padded.tokens_bt.shape[1]
    room = -(-(max_new_tokens + 2) // BUCKET) * BUCKET
    first_key, loop_key = jax.random.split(jax.random.key(seed))
    ids = num_ids or cfg.vocab_size
    first_b, draft_bv, cache, mtp_cache = _prefill(
        params, cfg, padded, balance_bias, first_key, length + room, sampling, ids
    )
    state = _loop(
        params,
        cfg,
        first_b,
        draft_bv,
        cache,
        mtp_cache,
        padded.pad_b,
        jnp.int32(length),
        balance_bias,
        stop_array(stop_ids),
        loop_key,
        sampling,
        max_new_tokens,
        ids,
    )
    out, count = np.asarray(state.out_bn), np.minimum(np.asarray(state.count_b), max_new_tokens)
    rows = [until_stop(row[:n].tolist(), stop_ids) for row, n in zip(out, count, strict=True)]
    return rows, Stats(int(state.drafted), int(state.accepted))

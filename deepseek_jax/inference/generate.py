"""Generation: one jitted prefill in the expanded form, then one jitted loop in the absorbed form.

Prompts of unequal length are padded on the left, so that all sequences of a batch write the same cache slot;
a pad is a segment of its own, which no real token sees. Lengths are rounded up to buckets, so that few
programs are compiled.

Dims: b batch, t prompt token, s cache slot, n new token, v vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.cache import extend
from deepseek_jax.inference.sampling import Sampling, sample
from deepseek_jax.model.decoding import decode, prepare, prepare_cache
from deepseek_jax.model.experts import decode_experts, routed_experts
from deepseek_jax.model.layers import logits
from deepseek_jax.model.moe import Experts
from deepseek_jax.model.sequence import WHOLE, Whole
from deepseek_jax.model.transformer import forward

BUCKET = 32  # prompt lengths and cache sizes are multiples of this


class Prompts(NamedTuple):
    """tokens_bt int32, padded on the left; pad_b: number of pads of each row."""

    tokens_bt: jax.Array
    pad_b: jax.Array


def pad_prompts(prompts: Sequence[Sequence[int]], bucket: int = BUCKET) -> Prompts:
    """Rows of equal length. Raises ValueError for no prompt or an empty one."""
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ValueError("generation needs at least one prompt, and each needs at least one token")
    length = -(-max(map(len, prompts)) // bucket) * bucket
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return Prompts(jnp.asarray(tokens), jnp.asarray([length - len(p) for p in prompts], jnp.int32))


def check_request(cfg: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises ValueError if there is nothing to generate or more positions than the model has."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    longest = max((len(p) for p in prompts), default=0)
    if longest + max_new_tokens > cfg.max_position_embeddings:
        raise ValueError(
            f"prompt of {longest} tokens + max_new_tokens={max_new_tokens} exceeds "
            f"max_position_embeddings={cfg.max_position_embeddings}"
        )
    out_of_range = [t for p in prompts for t in p if not 0 <= t < cfg.vocab_size]
    if out_of_range:
        raise ValueError(f"token id {out_of_range[0]} lies outside [0, vocab_size={cfg.vocab_size})")


def allowed(logits_bv: jax.Array, num_ids: int) -> jax.Array:
    """-inf for the ids that no tokenizer knows, `num_ids` and up."""
    return jnp.where(jnp.arange(logits_bv.shape[-1]) < num_ids, logits_bv, -jnp.inf)


def stop_array(stop_ids: Sequence[int]) -> jax.Array:
    return jnp.asarray(tuple(stop_ids) or (-1,), jnp.int32)


def is_stop(token_b: jax.Array, stop_ids: jax.Array) -> jax.Array:
    return (token_b[:, None] == stop_ids[None]).any(-1)


def until_stop(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The row up to its first stop token."""
    end = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
    return row[:end]


class _State(NamedTuple):
    step: jax.Array
    token_b: jax.Array
    done_b: jax.Array
    going: jax.Array  # whether any row is not done, here or on another device
    out_bn: jax.Array
    cache: Any
    key: jax.Array


def prefill(
    params: Any,
    cfg: ModelConfig,
    prompts: Prompts,
    bias_le: Any,
    slots: int,
    experts: Experts = routed_experts,
    sequence: Whole = WHOLE,
) -> tuple[jax.Array, Any]:
    """Logits of the last prompt token [b, v] and the cache, extended to `slots`.

    With a divided `sequence`, of the prompts that this device goes on to decode.
    """
    t = prompts.tokens_bt.shape[1]
    slot_bt = jnp.arange(t)[None] - prompts.pad_b[:, None]
    segments = (slot_bt >= 0).astype(jnp.int32)
    h, aux = forward(
        params,
        cfg,
        prompts.tokens_bt,
        bias_le,
        positions=jnp.maximum(slot_bt, 0),
        segments=segments,
        experts=experts,
        mtp=False,
        with_cache=True,
        sequence=sequence,
    )
    assert aux.cache is not None
    return logits(params, sequence.last(h)), extend(aux.cache, slots)


def decode_loop(
    params: Any,
    cfg: ModelConfig,
    first_bv: jax.Array,
    cache: Any,
    pad_b: jax.Array,
    start: jax.Array,
    bias_le: Any,
    stop_ids: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    new_tokens: int,
    num_ids: int,
    experts: Experts = decode_experts,
    absent_b: jax.Array | None = None,
    anyone: Callable[[jax.Array], jax.Array] = jnp.any,
) -> tuple[jax.Array, jax.Array]:
    """(tokens int32 [b, n], number of decode steps run). Rows that are done repeat their stop token.

    Over a mesh, `absent_b` marks rows that only fill the batch, and `anyone` tells all devices whether any of them has
    a row to go on with: those that are done serve the others' experts.
    """
    slots = cache.c_bsc.shape[2]
    ready = prepare(params, cfg)

    def pick(key, logits_bv):
        return sample(key, allowed(logits_bv, num_ids), sampling)

    def more(s: _State):
        return (s.step < new_tokens) & s.going

    def body(s: _State) -> _State:
        slot = start + s.step - 1  # of the token chosen last
        mask = (jnp.arange(slots)[None] <= slot) & (jnp.arange(slots)[None] >= pad_b[:, None])
        positions = (slot - pad_b)[:, None]
        h, cache = decode(
            ready, cfg, s.token_b[:, None], s.cache, slot, positions, mask[:, None], bias_le, experts
        )
        key, sub = jax.random.split(s.key)
        token = jnp.where(s.done_b, s.token_b, pick(sub, logits(params, h[:, 0])))
        out = lax.dynamic_update_slice_in_dim(s.out_bn, token[:, None], s.step, 1)
        done = s.done_b | is_stop(token, stop_ids)
        return _State(s.step + 1, token, done, anyone(~done), out, cache, key)

    key, sub = jax.random.split(key)
    token = pick(sub, first_bv)
    out = jnp.zeros((token.shape[0], new_tokens), jnp.int32).at[:, 0].set(token)
    done = is_stop(token, stop_ids)
    if absent_b is not None:
        done |= absent_b
    first = _State(jnp.int32(1), token, done, anyone(~done), out, prepare_cache(cache, cfg), key)
    state = lax.while_loop(more, body, first)
    return state.out_bn, state.step


_prefill = jax.jit(prefill, static_argnames=("cfg", "slots"))
_decode_loop = jax.jit(decode_loop, static_argnames=("cfg", "sampling", "new_tokens", "num_ids"))


def slots_for(length: int, max_new_tokens: int) -> int:
    """Slots of a cache for prompts padded to `length`, and what follows."""
    return length + -(-max_new_tokens // BUCKET) * BUCKET


def generate(
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
) -> list[list[int]]:
    """Continuations of the prompts, without the prompts; a stop token ends a row and is left out.

    Args:
        params, balance_bias: as for `forward`.
        prompts: token ids; lengths may differ.
        num_ids: ids the tokenizer knows; ids from there to vocab_size are never chosen.

    Raises:
        ValueError: an empty prompt, max_new_tokens < 1, or more positions than the model has.
    """
    check_request(cfg, prompts, max_new_tokens)
    padded = pad_prompts(prompts)
    length = padded.tokens_bt.shape[1]
    first_bv, cache = _prefill(params, cfg, padded, balance_bias, slots_for(length, max_new_tokens))
    out_bn, steps = _decode_loop(
        params,
        cfg,
        first_bv,
        cache,
        padded.pad_b,
        jnp.int32(length),
        balance_bias,
        stop_array(stop_ids),
        jax.random.key(seed),
        sampling,
        max_new_tokens,
        num_ids or cfg.vocab_size,
    )
    rows = np.asarray(out_bn)[:, : int(steps)].tolist()
    return [until_stop(row, stop_ids) for row in rows]

"""Generation on one device: prefill in the expanded form, decoding in the absorbed form, one token per step.

Dims: b row of the batch, t prompt token, s cache slot, v vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.batch import (
    Batch,
    Choice,
    Output,
    Prompts,
    Request,
    allowed,
    emit,
    empty_output,
)
from deepseek_jax.inference.driver import State, advancing, complete, grown, on_one_device
from deepseek_jax.inference.sampling import keys_at, log_prob, penalised, sample
from deepseek_jax.model.cache import Earlier, LatentCache, view_after_padding
from deepseek_jax.model.decoding import ONE_DEVICE, decode
from deepseek_jax.model.layers import logits
from deepseek_jax.model.layout import Inputs, Layout, single_device
from deepseek_jax.model.transformer import forward

# So many tokens of a prompt go through the model at once. Of a longer one, equal pieces do so, one after the other: only
# hidden states, cache, and keys and values of one layer then grow with the prompt.
PIECE = 2048


def prompt_forward(
    params: Any, cfg: ModelConfig, prompts: Prompts, bias_le: Any, layout: Layout
) -> tuple[jax.Array, LatentCache, jax.Array, jax.Array]:
    """Hidden states, latents, positions and segments of left-padded prompts.

    A pad is a segment of its own, which no real token sees.
    """
    slot_bt = jnp.arange(prompts.tokens_bt.shape[1])[None] - prompts.pad_b[:, None]
    positions, segments = jnp.maximum(slot_bt, 0), (slot_bt >= 0).astype(jnp.int32)
    run = functools.partial(forward, params, cfg, balance_bias=bias_le, layout=layout, mtp=False)
    if (n := _pieces(slot_bt.shape[1], layout.sequence.parts)) > 1:
        h, cache = _in_pieces(run, cfg, prompts, positions, n)
        return h, jax.vmap(layout.sequence.cached)(cache), positions, segments
    h, aux = run(Inputs(jnp.asarray(prompts.tokens_bt), positions, segments), with_cache=True)
    assert aux.cache is not None
    return h, aux.cache, positions, segments


def _pieces(t: int, parts: int) -> int:
    """The least number of equal pieces of at most PIECE tokens, each of which divides over `parts` devices."""
    return next(n for n in range(-(-t // PIECE), t + 1) if t % (n * parts) == 0)


def _in_pieces(
    run: Any, cfg: ModelConfig, prompts: Prompts, positions_bt: jax.Array, n: int
) -> tuple[jax.Array, LatentCache]:
    """Hidden states and latents of all sequences [l, b, t, ...]; each of n pieces attends to the latents of those before
    it, expanded again. A pad has a negative position, from which it sees nothing, and lies behind what tokens see."""
    b, t = prompts.tokens_bt.shape
    widths = (cfg.kv_lora_rank, cfg.qk_rope_head_dim)
    empty = LatentCache(*(jnp.zeros((cfg.num_hidden_layers, b, t, width), cfg.dtype) for width in widths))

    def piece(cache: LatentCache, xs: Any) -> tuple[LatentCache, jax.Array]:
        slot, tokens, positions = xs
        earlier = Earlier(cache, slot, jnp.asarray(prompts.pad_b))
        h, aux = run(Inputs(tokens, positions, earlier=earlier), with_cache=True)
        return aux.cache, h

    cut = [jnp.moveaxis(jnp.reshape(x, (b, n, t // n)), 1, 0) for x in (prompts.tokens_bt, positions_bt)]
    cache, h_nbtd = lax.scan(piece, empty, (jnp.arange(n) * (t // n), *cut))
    return jnp.moveaxis(h_nbtd, 0, 1).reshape(b, -1, h_nbtd.shape[-1]), cache


def choose(logits_bv: jax.Array, seen_bv: jax.Array, count_b: jax.Array, batch: Batch) -> Choice:
    """The token of each row that comes after count_b new ones, from the model's logits."""
    penalty = penalised(logits_bv, seen_bv, batch.sampling)
    key_b = keys_at(batch.sampling, count_b)
    token_b, sampled_b = sample(key_b, allowed(penalty, batch.num_ids), batch.sampling)
    return Choice(token_b[:, None], log_prob(logits_bv, token_b)[:, None], sampled_b[:, None])


def _chosen(logits_bv: jax.Array, seen_bv: jax.Array, out: Output, batch: Batch) -> tuple[Any, ...]:
    """(output, last token, tokens seen) after the next token."""
    choice = choose(logits_bv, seen_bv, out.count_b, batch)
    token_b = choice.token_bk[:, 0]
    return emit(out, batch, choice, jnp.ones_like(token_b)), token_b, with_seen(seen_bv, token_b)


def with_seen(seen_bv: jax.Array, token_b: jax.Array) -> jax.Array:
    """Tokens seen, one more of each row among them."""
    return seen_bv.at[jnp.arange(len(token_b)), token_b].set(True)


def prefill(
    params: Any,
    cfg: ModelConfig,
    prompts: Prompts,
    batch: Batch,
    bias_le: Any,
    layout: Layout,
) -> State:
    """See `driver.Method`. Where sequences are divided, of the prompts that this device goes on to decode: those of `batch`,
    and of prompts.seen_bv."""
    h, cache, _, _ = prompt_forward(params, cfg, prompts, bias_le, layout)
    last_bv = logits(params, layout.sequence.last(h))
    out, token_b, seen_bv = _chosen(last_bv, jnp.asarray(prompts.seen_bv), empty_output(batch), batch)
    return State(out, token_b, cache, seen_bv, jnp.int32(0))


def step(ready: Any, cfg: ModelConfig, batch: Batch, bias_le: Any, state: State, layout: Layout) -> State:
    """One token more of each row. All rows write the same slot: the prompts end together, and each step adds one."""
    view = view_after_padding(state.cache, batch.length + state.steps, 1, batch.pad_b)
    h, view = decode(ready, cfg, state.token_b[:, None], view, bias_le, layout)
    out, token_b, seen_bv = _chosen(logits(ready, h[:, 0]), state.extra, state.out, batch)
    return state._replace(out=out, token_b=token_b, cache=view.cache, extra=seen_bv)


_prefill = jax.jit(functools.partial(prefill, layout=single_device()), static_argnames=("cfg",))
_grow = jax.jit(grown, static_argnames=("cfg", "slots"))
_advance = advancing(functools.partial(step, layout=ONE_DEVICE))
plain = on_one_device(_prefill, _grow, _advance)


def generate(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    balance_bias: Any = None,
    **options: Any,
) -> list[list[int]]:
    """Continuations of the prompts, without the prompts; a stop token ends a row and is left out.

    Args:
        params, balance_bias: as for `forward`.
        prompts, max_new_tokens, options: see `batch.Request`.

    Raises:
        ValueError: an empty prompt, max_new_tokens < 1, or more positions than the model has.
    """
    request = Request(prompts, max_new_tokens, **options)
    rows, _ = complete(plain(params, cfg, balance_bias), cfg, request)
    return [row.tokens for row in rows]

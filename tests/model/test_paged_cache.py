"""Decoding over pages: equal to decoding over contiguous slots and to the expanded attention, one or several new tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.cache import LatentCache, empty_pages, paged_view
from deepseek_jax.model.decoding import ONE_DEVICE, decode, prepare
from deepseek_jax.model.mla import absorb, down, mla, mla_decode
from deepseek_jax.model.rope import rope_table
from pallas_kernels.mla_decode.ops import dequantize_cache, quantize_cache
from tests.oracle.slots import View, empty, view_after_padding
from tests.oracle.tiny import V2, rel, weights

CFG = dataclasses.replace(V2, num_hidden_layers=2)  # with YaRN
PAGE, B, T = 8, 3, 3
FULL = 24  # tokens of each sequence at first; the lengths then go on from fewer
LENGTHS = np.array([7, 24, 13], np.int32)
TABLE = np.array(
    [[5, 2, 9, 0, 77], [1, 8, 3, 12, 99], [11, 4, 7, 10, -5]], np.int32
)  # the last column is no page
PAGES = 13


class RoundedView(View):
    """A contiguous view that stores what an FP8 cache holds."""

    def append(self, i, new):
        c = new.c_bsc.shape[-1]
        rounded = dequantize_cache(quantize_cache(jnp.concatenate(new, axis=-1), c), c)
        return View.append(self, i, LatentCache(rounded[..., :c], rounded[..., c:]))


@jax.jit
def step(model, tokens_bt, view):
    ready, bias = model
    return decode(ready, CFG, tokens_bt, view, bias, ONE_DEVICE)[:2]


def slots(cache, slot, fp8):
    view = view_after_padding(cache, slot, T, jnp.zeros(B, jnp.int32))
    return RoundedView(*view) if fp8 else view


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
def test_pages_equal_slots(fp8):
    """Sequences of three lengths go on by three tokens each, as in verifying drafts; then one is put aside, and the
    others go on. Float32 sums in another order: 1e-5."""
    params, bias = weights(CFG)
    model = prepare(params, CFG), bias
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (B, FULL + 2 * T)).astype(np.int32)
    cache = empty(CFG, B, 64)
    pages = empty_pages(CFG, CFG.num_hidden_layers, PAGES, fp8, PAGE)
    pages = jnp.full_like(pages, 0xFF if fp8 else jnp.nan)  # what was not written must not be looked at
    table = jnp.asarray(TABLE)

    def both(new, cache, pages, before):
        want, view = step(model, new, slots(cache, jnp.asarray(before), fp8))
        got, paged = step(model, new, paged_view(pages, table, jnp.asarray(before) + T, T))
        return got, want, view.cache, paged.pages_lpsw

    for start in range(0, FULL, T):
        got, want, cache, pages = both(
            tokens[:, start : start + T], cache, pages, np.full(B, start, np.int32)
        )
        assert rel(got, want) < 1e-5
    got, want, cache, pages = both(tokens[:, FULL : FULL + T], cache, pages, LENGTHS)
    assert rel(got, want) < 1e-5
    # A sequence without tokens neither reads nor writes.
    before = np.array([-T, LENGTHS[1] + T, LENGTHS[2] + T], np.int32)
    new = tokens[:, FULL + T :]
    want, _ = step(model, new, slots(cache, jnp.maximum(before, 0), fp8))
    got, paged = step(model, new, paged_view(pages, table, jnp.asarray(before) + T, T))
    assert rel(got[1:], want[1:]) < 1e-5
    np.testing.assert_array_equal(*(np.asarray(x)[:, TABLE[0, :4]] for x in (paged.pages_lpsw, pages)))
    assert np.isfinite(got).all()


def test_a_row_of_fewer_new_tokens():
    """Of T new tokens of each sequence the last 1, 3 and 2 count, as in a prompt's chunk: the others are written nowhere, and
    send no token to an expert. Equal to one token at a time, but for the order of sums."""
    params, bias = weights(CFG)
    model, new = (prepare(params, CFG), bias), np.array([1, 3, 2], np.int32)
    tokens = np.random.default_rng(2).integers(0, CFG.vocab_size, (B, 2 * T)).astype(np.int32)
    pages = jnp.full_like(empty_pages(CFG, CFG.num_hidden_layers, PAGES, False, PAGE), jnp.nan)
    table = jnp.asarray(TABLE)
    _, view = step(model, tokens[:, :T], paged_view(pages, table, jnp.full(B, T), T))
    garbage = np.where(np.arange(T)[None] < T - new[:, None], 0, tokens[:, T:])
    got, at_once = step(model, garbage, paged_view(view.pages_lpsw, table, jnp.asarray(T + new), T, new))
    for i in range(B):
        one = view.pages_lpsw
        for n in range(new[i]):
            token = tokens[:, 2 * T - new[i] + n, None]
            lengths = jnp.where(np.arange(B) == i, T + n + 1, 0)
            want, put = step(model, token, paged_view(one, table, lengths, 1))
            one = put.pages_lpsw
            assert rel(got[i, T - new[i] + n], want[i, 0]) < 1e-5
        first = np.asarray(one)[:, TABLE[i, 0], : T + new[i]]
        assert rel(np.asarray(at_once.pages_lpsw)[:, TABLE[i, 0], : T + new[i]], first) < 1e-5
        assert np.isnan(np.asarray(at_once.pages_lpsw)[:, TABLE[i, 0], T + new[i] :]).all()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2.0**-6)])
def test_absorbed_equals_expanded_with_yarn(dtype, bound):
    """Eight products or sums in a row round to BF16 in each form, by at most 2^-9 of their size each."""
    cfg = dataclasses.replace(CFG, dtype=dtype)
    p = jax.tree.map(lambda w: jnp.asarray(w[0], dtype), weights(cfg)[0]["dense_layers"]["attn"])
    x = jnp.asarray(np.random.default_rng(1).standard_normal((B, FULL, cfg.hidden_size)), dtype)
    rope = rope_table(cfg, jnp.arange(FULL)[None])

    @jax.jit
    def forms(x):
        expanded, latent = mla(p, cfg, x, rope)
        lengths = jnp.full(B, FULL, jnp.int32)
        view = paged_view(empty_pages(cfg, 1, PAGES, page=PAGE), jnp.asarray(TABLE), lengths, FULL).append(
            0, latent
        )
        view = paged_view(view.pages_lpsw, view.block_table, lengths, T)
        tail = tuple(part[:, -T:] for part in rope)
        low = down(p, cfg, x[:, -T:])
        got = mla_decode(absorb(p, cfg), cfg, low, tail, functools.partial(view.attend, 0))
        return got, expanded[:, -T:]

    got, want = forms(x)
    assert got.dtype == dtype
    assert rel(got, want) < bound

"""A prompt's chunk over pages in the expanded form: equal to the absorbed form, and chosen where it costs less."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import v3_671b
from deepseek_jax.config import from_config_dict
from deepseek_jax.model import decoding, over_pages
from deepseek_jax.model.cache import empty_pages, paged_view
from deepseek_jax.model.decoding import ONE_DEVICE, decode, prepare
from deepseek_jax.model.mla import absorb, down, latents, mla_decode, queries
from deepseek_jax.model.over_pages import CPU, H100, expands, mla_over_pages
from deepseek_jax.model.platform import as_on_gpus
from deepseek_jax.model.rope import rope_table
from tests.oracle.tiny import V2, V3, rel, weights

PAGE, PAGES, T = 8, 24, 12
TABLE = np.random.default_rng(0).permutation(PAGES).reshape(4, 6).astype(np.int32)
# A prompt's first chunk, chunks behind prefixes of two lengths, and a row without tokens. The last columns are no pages.
LENGTHS, NEW = np.array([12, 29, 44, 0], np.int32), np.array([12, 5, 12, 0], np.int32)
TABLE[np.arange(6)[None] * PAGE >= LENGTHS[:, None]] = 9999


@pytest.mark.parametrize(
    ("cfg", "kind", "blocks", "bound"),
    [(V3, "float32", 1, 1e-5), (V2, "float32", 3, 1e-5), (V3, "fp8", 2, 1e-5), (V2, "bfloat16", 3, 2.0**-6)],
    ids=["q_lora", "full_rank_queries_yarn", "fp8_pages", "bfloat16"],
)
def test_both_forms_over_pages(cfg, kind, blocks, bound, monkeypatch):
    """Float32 sums in another order; in BF16 eight results in a row are rounded by 2^-9 of their size in each form."""
    monkeypatch.setattr(over_pages, "EXPANDED", 4 * PAGE * -(-6 // blocks))
    cfg = dataclasses.replace(cfg, dtype="bfloat16" if kind == "bfloat16" else "float32")
    p = absorb(
        jax.tree.map(lambda w: jnp.asarray(w[0], cfg.dtype), weights(cfg)[0]["dense_layers"]["attn"]), cfg
    )
    rng = np.random.default_rng(1)
    old = jnp.asarray(rng.standard_normal((4, 48, cfg.hidden_size)), cfg.dtype)
    new = jnp.asarray(rng.standard_normal((4, T, cfg.hidden_size)), cfg.dtype)
    pages = jnp.full_like(empty_pages(cfg, 2, PAGES, kind == "fp8", PAGE), 0xFF if kind == "fp8" else jnp.nan)

    def written(x_btd, view):
        return view.append(1, latents(p, cfg, down(p, cfg, x_btd), rope_table(cfg, view.positions_bt)))

    @jax.jit
    def forms(old, new):
        table, lengths = jnp.asarray(TABLE), jnp.asarray(LENGTHS)
        slot = jnp.arange(48)[None]
        positions = jnp.where(slot < (lengths - NEW)[:, None], slot, -1)
        view = written(old, paged_view(pages, table, lengths, 48)._replace(positions_bt=positions))
        view = written(new, paged_view(view.pages_lpsw, table, lengths, T, jnp.asarray(NEW)))
        rope = rope_table(cfg, view.positions_bt)
        low = down(p, cfg, new)
        absorbed = mla_decode(p, cfg, low, rope, functools.partial(view.attend, 1))
        return mla_over_pages(p, cfg, queries(p, cfg, low, rope), view, 1), absorbed

    got, want = forms(old, new)
    assert got.dtype == cfg.dtype and np.isfinite(got).all()
    for row, n in enumerate(NEW):
        assert n == 0 or rel(got[row, T - n :], want[row, T - n :]) < bound


def test_a_model_reads_a_prompt_in_chunks(monkeypatch):
    """Three chunks of 16 tokens, expanded, then three tokens, absorbed: all as token by token, absorbed. Counting FLOPs
    alone, 16 tokens of a tiny model are expanded before 48; sums come in another order."""
    monkeypatch.setattr(decoding, "CPU", 0)
    forms = []
    monkeypatch.setattr(
        over_pages, "mla_over_pages", lambda *a, **k: forms.append("expanded") or mla_over_pages(*a, **k)
    )
    cfg = dataclasses.replace(V2, num_hidden_layers=2, first_k_dense_replace=2)
    params, bias = weights(cfg)
    ready, tokens = (
        prepare(params, cfg),
        np.random.default_rng(3).integers(0, cfg.vocab_size, (2, 51)).astype(np.int32),
    )

    def read(sizes):
        step = jax.jit(lambda tokens, view: decode(ready, cfg, tokens, view, bias, ONE_DEVICE))
        pages, table = empty_pages(cfg, 2, PAGES, page=PAGE), jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
        hidden, start = [], 0
        for size in sizes:
            end = start + size
            view = paged_view(pages, table, jnp.full(2, end, jnp.int32), size)
            h, view, _ = step(tokens[:, start:end], view)
            pages, start = view.pages_lpsw, end
            hidden.append(h)
        return np.concatenate(hidden, axis=1)

    got = read([16, 16, 16, 3])
    assert forms == ["expanded"]  # traced once for both layers, in the one program for 16 tokens
    assert rel(got, read([3] * 17)) < 1e-5
    assert len(forms) == 1


def test_how_much_is_expanded_at_a_time():
    """Of a table of 128 pages of 64 tokens: for GPUs 4,096 tokens, on whatever machine; on a CPU as many as the chunk has."""
    view = paged_view(jnp.zeros((1, 1, 64, 1)), jnp.zeros((1, 128), jnp.int32), jnp.array([100]), 100)
    assert over_pages._blocks(view, 1, 100) == (2, 64)
    with as_on_gpus():
        assert over_pages._blocks(view, 1, 100) == (64, 2)


def test_what_costs_less():
    """In DeepSeek-V3, the up-projections of a cached token are 131,072 multiplications, a pair saves 768: behind a long
    prefix 171 tokens. What the expanded keys and values cost to write and read comes to some 320 tokens more."""
    v3 = from_config_dict(v3_671b.get_config()).model
    assert expands(v3, 172, 10**7, 0) and not expands(v3, 170, 10**7, 0)
    assert expands(v3, 492, 131072, H100) and not expands(v3, 488, 131072, H100)
    for t in (512, 2048, 8192):
        assert expands(v3, t, t, H100) and expands(v3, t, 131072, H100)
    for t in (1, 2, 5):
        assert not any(expands(v3, t, s, balance) for s in (64, 4096, 131072) for balance in (H100, CPU))
    wide = dataclasses.replace(v3, kv_lora_rank=128)  # no wider than keys and values: nothing is saved
    assert not expands(wide, 4096, 131072, 0)

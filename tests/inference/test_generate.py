"""Generation over the latent cache against the whole forward pass, token for token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference.cache import extend
from deepseek_jax.inference.generate import BUCKET, generate, pad_prompts
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.model.params import abstract
from deepseek_jax.model.transformer import DeepSeekV3, forward, model_params
from tests.oracle.tiny import V2, V3, weights

RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, V3.vocab_size, n).tolist() for n in (5, 1, 12)]
NEW = 20


@functools.cache
def case(name):
    cfg = {"v3": dataclasses.replace(V3, num_hidden_layers=2, num_nextn_predict_layers=0), "v2": V2}[name]
    params, bias = jax.tree.map(jax.numpy.asarray, weights(cfg, seed=4))
    apply = jax.jit(functools.partial(DeepSeekV3(cfg).apply, {"params": params}, balance_bias=bias))
    return cfg, params, bias, lambda tokens: np.asarray(apply(tokens)[0])


def by_full_forward(name, prompt, new, allowed=None):
    """Greedy, the whole sequence again for every token. One length: what follows cannot matter."""
    cfg, _, _, logits = case(name)
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + new):
        tokens[0, i] = logits(tokens)[0, i - 1, : allowed or cfg.vocab_size].argmax()
    return tokens[0, len(prompt) : len(prompt) + new].tolist()


def run(name, prompts=PROMPTS, new=NEW, **options):
    cfg, params, bias, _ = case(name)
    return generate(params, cfg, prompts, new, balance_bias=bias, **options)


@pytest.mark.parametrize("name", ["v3", "v2"])
def test_greedy_through_the_cache_is_greedy_by_full_forward(name):
    want = [by_full_forward(name, prompt, NEW) for prompt in PROMPTS]
    assert run(name) == want
    assert len({tuple(row) for row in want}) == 3  # the rows do not simply agree


def test_a_row_does_not_depend_on_its_batch():
    others = [RNG.integers(0, V3.vocab_size, n).tolist() for n in (13, 2)]
    assert run("v3", [PROMPTS[0], *others])[0] == run("v3")[0]


def test_stop_token_ends_its_row_only():
    rows = run("v3")
    stop = next(t for t in rows[0] if any(t not in row for row in rows[1:]))
    want = [row[: row.index(stop)] if stop in row else row for row in rows]
    assert run("v3", stop_ids=[stop]) == want
    assert len(want[0]) < NEW
    # Every row ended: the loop ends early, and two stop ids count alike.
    first = [row[0] for row in rows]
    assert run("v3", stop_ids=first) == [[], [], []]


def test_ids_the_tokenizer_lacks_are_never_chosen():
    free = run("v3")
    limit = max(max(row) for row in free)  # at least one choice changes
    limited = run("v3", num_ids=limit)
    assert max(max(row) for row in limited) < limit and limited != free
    assert limited[0] == by_full_forward("v3", PROMPTS[0], NEW, limit)


NUCLEUS = Sampling(temperature=1.0, top_p=0.5)


def test_sampling_is_a_function_of_the_seed():
    assert run("v3", sampling=NUCLEUS, seed=1) == run("v3", sampling=NUCLEUS, seed=1)
    assert run("v3", sampling=NUCLEUS, seed=1) != run("v3", sampling=NUCLEUS, seed=2)


def test_sampled_tokens_stay_in_the_nucleus():
    """Each token of a row lies in the nucleus of the full forward's distribution at its position."""
    _, _, _, logits = case("v3")
    for prompt, row in zip(PROMPTS, run("v3", sampling=NUCLEUS, seed=3), strict=True):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(prompt) + NEW] = prompt + row
        all_logits = logits(tokens)[0].astype(np.float64)
        for position, token in enumerate(row, start=len(prompt)):
            x = all_logits[position - 1]
            prob = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
            # Rounding of the cache's logits, 1e-5 of them, may swap near equals.
            assert prob[prob > prob[token] * (1 + 1e-4)].sum() < NUCLEUS.top_p


def test_padding_is_on_the_left_to_a_bucket():
    padded = pad_prompts([[7, 8, 9], [5]])
    assert padded.tokens_bt.shape == (2, BUCKET)
    assert np.asarray(padded.tokens_bt)[:, -3:].tolist() == [[7, 8, 9], [0, 0, 5]]
    assert np.asarray(padded.pad_b).tolist() == [BUCKET - 3, BUCKET - 1]
    assert pad_prompts([[1] * (BUCKET + 1)]).tokens_bt.shape == (1, 2 * BUCKET)


def test_cache_holds_latents_and_nothing_per_head():
    params, tokens = abstract(model_params(V3)), jax.ShapeDtypeStruct((2, 5), jnp.int32)
    _, aux = jax.eval_shape(lambda p, t: forward(p, V3, t, mtp=False, with_cache=True), params, tokens)
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), aux.cache)
    assert cache.c_bsc.shape == (3, 2, 5, V3.kv_lora_rank) and cache.c_bsc.dtype == V3.dtype
    assert sum(x.size for x in jax.tree.leaves(cache)) == 3 * 2 * 5 * (V3.kv_lora_rank + V3.qk_rope_head_dim)
    longer = extend(jax.tree.map(lambda x: x + 1, cache), 8)
    assert longer.c_bsc.shape[2] == 8
    np.testing.assert_array_equal(longer.c_bsc[:, :, :5], 1)
    np.testing.assert_array_equal(longer.c_bsc[:, :, 5:], 0)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 4, "at least one prompt"),
        ([[1], []], 4, "each needs at least one token"),
        ([[1]], 0, "max_new_tokens=0 must be at least 1"),
        ([[1] * 60], 5, r"prompt of 60 tokens \+ max_new_tokens=5 exceeds max_position_embeddings=64"),
        ([[1, 67]], 4, r"token id 67 lies outside \[0, vocab_size=67\)"),
        ([[-1]], 4, "token id -1 lies outside"),
    ],
)
def test_bad_requests(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        run("v3", prompts, new)

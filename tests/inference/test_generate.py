"""Generation over the latent cache against the whole forward pass, token for token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference import generate as plain_file
from deepseek_jax.inference.batch import SMALLEST, Request, pad_prompts, size_for, slots_for
from deepseek_jax.inference.driver import complete, stream
from deepseek_jax.inference.generate import generate, plain
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.model import decoding
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.modules import DeepSeekV3
from deepseek_jax.model.params import abstract
from deepseek_jax.model.transformer import forward, model_params
from tests.oracle.tiny import V2, V3, weights
from tests.parallel.comparison import BOUND, difference

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


def test_padding_is_on_the_left_to_a_size():
    padded = pad_prompts([[7, 8, 9], [5]], 10)
    assert padded.tokens_bt.shape == (2, SMALLEST)
    assert padded.tokens_bt[:, -3:].tolist() == [[7, 8, 9], [0, 0, 5]]
    assert padded.pad_b.tolist() == [SMALLEST - 3, SMALLEST - 1]
    assert [np.flatnonzero(row).tolist() for row in padded.seen_bv] == [[7, 8, 9], [5]]
    assert pad_prompts([[1] * (SMALLEST + 1)], 10, divides=5).tokens_bt.shape == (1, 100)


def test_sizes_are_few_and_not_much_larger_than_asked():
    assert [size_for(n) for n in (1, 64, 65, 96, 97, 128, 129, 4096, 4097)] == [
        *(64, 64, 96, 96, 128, 128, 192, 4096, 6144)
    ]
    sizes = [size_for(n) for n in range(1, 16385)]
    assert len(set(sizes)) == 17 and sizes == sorted(sizes)
    assert all(n <= size <= max(64, 1.5 * n) for n, size in enumerate(sizes, start=1))
    assert [slots_for(n) for n in (1, 256, 257, 512, 5000)] == [256, 256, 512, 512, 8192]


def test_cache_holds_latents_and_nothing_per_head():
    params, tokens = abstract(model_params(V3)), jax.ShapeDtypeStruct((2, 5), jnp.int32)
    _, aux = jax.eval_shape(
        lambda p, t: forward(p, V3, Inputs(t), None, single_device(), False, True), params, tokens
    )
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), aux.cache)
    assert cache.c_bsc.shape == (3, 2, 5, V3.kv_lora_rank) and cache.c_bsc.dtype == V3.dtype
    assert sum(x.size for x in jax.tree.leaves(cache)) == 3 * 2 * 5 * (V3.kv_lora_rank + V3.qk_rope_head_dim)


def test_a_prompt_in_pieces_is_the_prompt_whole(monkeypatch):
    """Of rows that begin behind whole pieces of padding, too: states and latents of their tokens."""
    cfg, params, bias, _ = case("v3")
    rows = [RNG.integers(0, cfg.vocab_size, n).tolist() for n in (SMALLEST, 33, 7)]
    prompts = pad_prompts(rows, cfg.vocab_size)
    real = np.arange(SMALLEST)[None] >= prompts.pad_b[:, None]

    def run(piece):
        monkeypatch.setattr(plain_file, "PIECE", piece)
        program = jax.jit(lambda p: plain_file.prompt_forward(params, cfg, p, bias, single_device())[:2])
        h, cache = program(prompts)
        return np.asarray(h)[real], *(np.asarray(x)[:, real] for x in cache)

    for got, want in zip(run(16), run(SMALLEST), strict=True):
        assert difference(got, want) < BOUND


def test_a_long_prompt_has_the_fewest_pieces():
    assert [plain_file._pieces(t, 1) for t in (64, 2048, 3072, 4096, 6144)] == [1, 1, 2, 2, 3]
    assert plain_file._pieces(2304, 4) == 2 and plain_file._pieces(2052, 4) == 3
    for parts in (1, 2, 3, 5, 6, 7, 12, 16):
        for n in (1500, 4096, 8192, 131072):
            t = size_for(n, parts)
            assert t % parts == 0 and n <= t <= 1.5 * n
            assert plain_file._pieces(t, parts) <= 2 * -(-t // plain_file.PIECE)


def test_what_changes_from_call_to_call_compiles_nothing():
    """Settings, seeds, stops, lengths up to a size, and where the loop is cut are all arrays."""
    programs = (plain_file._prefill, plain_file._grow, plain_file._advance)
    for program in programs:
        program.clear_cache()
    run("v3")
    assert [program._cache_size() for program in programs] == [1, 1, 1]
    run("v3", new=1)
    run("v3", prompts=[[1] * 30, [2], [3]], new=34)
    run("v3", sampling=Sampling(0.7, 0.9, 5, 0.01, 1.1), seed=[4, 5, 2**33], stop_ids=range(3), num_ids=60)
    assert [program._cache_size() for program in programs] == [1, 1, 1]


def test_the_loop_may_be_cut_anywhere():
    """Bitwise the same tokens and log-probabilities, whatever the number of steps between two looks."""
    cfg, params, bias, _ = case("v3")
    request = Request(PROMPTS, NEW, Sampling(1.0, top_k=20, repetition_penalty=1.2), seed=3)
    method = plain(params, cfg, bias)

    def cut(size: int):
        pieces = method._replace(advance=lambda batch, state, n: method.advance(batch, state, n and size))
        states = [jax.tree.map(np.asarray, state.out) for state in stream(pieces, cfg, request)]
        return len(states), states[-1]

    (looks, want), *others = cut(100), cut(1), cut(7)
    assert looks == 2 and [n for n, _ in others] == [NEW, 4]
    for _, got in others:
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_rows_end_where_the_caller_says():
    cfg, params, bias, _ = case("v3")
    request = Request(PROMPTS, NEW)
    counts = []
    ended = lambda: np.array([True, len(counts) > 1, len(counts) > 2])  # noqa: E731
    for state in stream(plain(params, cfg, bias), cfg, request, ended=ended):
        counts.append(np.asarray(state.out.count_b).tolist())
    assert counts[-1][0] == 1 and counts[-1][0] < counts[-1][1] < counts[-1][2] < NEW


def log_softmax(x_nv):
    shifted = x_nv - x_nv.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_log_probabilities_are_the_models_and_the_samplers():
    """The model's own before any setting; the sampler's after penalty, temperature and top-k: in float64, from the logits
    of the full forward pass, which differ from the cache's by float32 rounding (1e-5 of them)."""
    cfg, params, bias, logits = case("v3")
    request = Request(PROMPTS, NEW, Sampling(0.6, top_k=4, repetition_penalty=1.5), seed=1)
    for prompt, row in zip(PROMPTS, complete(plain(params, cfg, bias), cfg, request)[0], strict=True):
        text = np.zeros((1, 32), np.int32)
        text[0, : len(prompt) + NEW] = prompt + row.tokens
        x_nv = logits(text)[0, len(prompt) - 1 : len(prompt) + NEW - 1].astype(np.float64)
        at = np.arange(NEW), row.tokens
        np.testing.assert_allclose(row.logprobs, log_softmax(x_nv)[at], atol=1e-4)
        for i in range(NEW):
            seen = [*prompt, *row.tokens[:i]]
            x_nv[i, seen] = np.where(x_nv[i, seen] > 0, x_nv[i, seen] / 1.5, x_nv[i, seen] * 1.5)
        x_nv /= 0.6
        x_nv[x_nv < np.sort(x_nv)[:, -4:-3]] = -np.inf
        np.testing.assert_allclose(row.sampled_logprobs, log_softmax(x_nv)[at], atol=3e-4)
        assert row.finish_reason == "length" and min(row.sampled_logprobs) < -0.01


def test_greedy_with_a_penalty_by_the_full_forward():
    """As `transformers`: tokens of the prompt count, and greedy choices are penalised, too."""
    _, _, _, logits = case("v3")
    got = run("v3", sampling=Sampling(repetition_penalty=3.0))
    for prompt, row in zip(PROMPTS, got, strict=True):
        tokens = list(prompt)
        for token in row:
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(tokens)] = tokens
            x = logits(padded)[0, len(tokens) - 1].copy()
            x[tokens] = np.where(x[tokens] > 0, x[tokens] / 3, x[tokens] * 3)
            assert x.argmax() == token
            tokens.append(token)
    assert got != run("v3")


def test_finish_reasons():
    cfg, params, bias, _ = case("v3")
    first = run("v3")
    stop = next(t for t in first[0] if any(t not in row for row in first[1:]))
    rows, _ = complete(plain(params, cfg, bias), cfg, Request(PROMPTS, NEW, stop_ids=[stop]))
    assert [row.finish_reason for row in rows] == ["stop" if stop in row else "length" for row in first]
    assert [len(row.logprobs) for row in rows] == [len(row.tokens) for row in rows]


def test_deep_models_scan_or_unroll_alike(monkeypatch):
    """On CPU layers lie apart; elsewhere deep models scan stacks of layers, and of caches."""
    cfg, params, bias, _ = case("v3")
    cfg = dataclasses.replace(cfg, n_shared_experts=2)
    want = run("v3")
    monkeypatch.setattr(decoding, "unrolled", lambda cfg: False)
    jax.clear_caches()
    got = generate(params, cfg, PROMPTS, NEW, balance_bias=bias)
    jax.clear_caches()
    assert got == want


def test_layers_apart_are_the_same_memory():
    """`prepare` copies no weight of a CPU but the absorbed ones, and those that do not lie on 64 bytes."""
    cfg = dataclasses.replace(case("v3")[0], hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3)
    params = jax.tree.map(jnp.asarray, weights(cfg)[0])
    ready = decoding.prepare(params, cfg)
    whole = params["moe_layers"]["ffn"]["experts"]["w_up_edf"]
    for i, layer in enumerate(ready["moe_layers"]):
        part = layer["ffn"]["experts"]["w_up_edf"]
        assert part.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + i * part.nbytes
        np.testing.assert_array_equal(part, whole[i])


def test_a_bfloat16_model_decodes_in_float32_on_cpu():
    """Its weights' values, without a conversion at each call; the prefill keeps the compute dtype."""
    cfg, params, bias, _ = case("v3")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ready = decoding.prepare(half, decoding.decoding_config(dataclasses.replace(cfg, dtype="bfloat16")))
    assert {x.dtype.name for x in jax.tree.leaves(ready["moe_layers"][0]["ffn"])} == {"float32"}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    low = generate(half, dataclasses.replace(cfg, dtype="bfloat16"), PROMPTS, 3, balance_bias=bias)
    high = generate(exact, cfg, PROMPTS, 3, balance_bias=bias)
    assert sum(x == y for x, y in zip(low, high, strict=True)) >= 2  # a prompt's latents are rounded


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

"""Generation over the latent cache against the whole forward pass, token for token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import Model
from deepseek_jax.inference.offline import options_for, seeds_of
from deepseek_jax.model import decoding
from deepseek_jax.model.cache import PAGE, empty_pages
from deepseek_jax.model.modules import DeepSeekV3
from deepseek_jax.serving import build, one_device
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import Sampling
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


@functools.cache
def model(name):
    return Model(*case(name)[:3])


def run(name, prompts=PROMPTS, new=NEW, **options):
    return model(name).generate(prompts, new, **options)


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
    class Knows:
        vocab_size = max(map(max, run("v3")))  # at least one choice changes
        stop_ids = ()

    cfg, params, bias, _ = case("v3")
    limited = Model(cfg, params, bias)
    limited.tokenizer = Knows()
    made = limited.ready()
    rows = {}
    call = limited._offline.call([Request("0", PROMPTS[0], NEW)], False)
    for updates in limited._offline.answers(call):
        for update in updates:
            rows.setdefault(update.id, []).extend(token.id for token in update.tokens)
    assert made is limited.ready()
    assert rows["0"] == by_full_forward("v3", PROMPTS[0], NEW, Knows.vocab_size)
    assert max(rows["0"]) < Knows.vocab_size


NUCLEUS = {"temperature": 1.0, "top_p": 0.5}


def test_sampling_is_a_function_of_the_seed():
    assert run("v3", seed=1, **NUCLEUS) == run("v3", seed=1, **NUCLEUS)
    assert run("v3", seed=1, **NUCLEUS) != run("v3", seed=2, **NUCLEUS)


def test_sampled_tokens_stay_in_the_nucleus():
    """Each token of a row lies in the nucleus of the full forward's distribution at its position."""
    _, _, _, logits = case("v3")
    for prompt, row in zip(PROMPTS, run("v3", seed=3, **NUCLEUS), strict=True):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(prompt) + NEW] = prompt + row
        all_logits = logits(tokens)[0].astype(np.float64)
        for position, token in enumerate(row, start=len(prompt)):
            x = all_logits[position - 1]
            prob = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
            # Rounding of the cache's logits, 1e-5 of them, may swap near equals.
            assert prob[prob > prob[token] * (1 + 1e-4)].sum() < NUCLEUS["top_p"]


def test_seeds_of_rows():
    """The first row's is that of the call; one that is given for a row is the row's own."""
    assert seeds_of(7, 1) == [7] and len(set(seeds_of(7, 1000))) == 1000
    rows = run("v3", seed=9, **NUCLEUS)
    assert run("v3", [PROMPTS[0]], seed=9, **NUCLEUS) == rows[:1]
    given = run("v3", seed=seeds_of(9, 3), **NUCLEUS)
    assert given == rows
    assert seeds_of([-1, 2**40], 2) == [2**32 - 1, 0]


def test_sizes_are_few():
    def options(lengths, new, ranks=1):
        return options_for([Request("", [0] * n, new) for n in lengths], 5000, ranks, False)

    assert (options([3], 5).rows, options([3], 5).max_model_len) == (1, 256)
    assert (options([3] * 5, 300).rows, options([3] * 5, 300).max_model_len) == (8, 512)
    assert (options([4000] * 200, 500).rows, options([4000] * 200, 500).max_model_len) == (64, 5000)
    assert options([3] * 9, 5, ranks=8).rows == 2


def test_cache_holds_latents_and_nothing_per_head():
    cfg = case("v3")[0]
    pages = empty_pages(cfg, cfg.num_hidden_layers, 7)
    assert pages.nbytes == 7 * PAGE * cfg.kv_cache_bytes_per_token("float32")
    assert pages.shape[-1] == cfg.kv_lora_rank + cfg.qk_rope_head_dim


def test_what_changes_from_call_to_call_compiles_nothing():
    """Settings, seeds, stops, and lengths up to a size are all arrays."""
    run("v3")
    sizes = [program._cache_size() for program in (one_device._prefill, one_device._decode)]
    run("v3", new=1)
    run("v3", prompts=[[1] * 16, [2], [3]], new=34)
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1}
    run("v3", seed=[4, 5, 2**33], stop_ids=range(3), **settings)
    assert [program._cache_size() for program in (one_device._prefill, one_device._decode)] == sizes


def test_a_call_that_is_left_off_harms_no_other():
    made = model("v3")
    requests = made._requests(PROMPTS, NEW, Sampling(), None, 0)
    for n, _ in enumerate(made._offline.answers(made._offline.call(requests, False))):
        if n == 2:
            break
    assert run("v3") == [by_full_forward("v3", prompt, NEW) for prompt in PROMPTS]


def test_calls_between_two_turns_of_another_harm_it_not():
    """As where a stream's pieces are read, and another text is asked for between them."""
    made, tokens = model("v3"), []
    want = [by_full_forward("v3", prompt, NEW) for prompt in PROMPTS]
    for updates in made._offline.answers(made._offline.call([Request("0", PROMPTS[2], NEW)], False)):
        tokens += [token.id for update in updates for token in update.tokens]
        if len(tokens) < 3:
            assert run("v3", PROMPTS[:1]) == want[:1]
    assert tokens == want[2]


def test_the_bias_and_the_number_of_tokens_are_those_of_the_call():
    """Another bias is heard though the parameters are the same; a number of tokens may be NumPy's."""
    cfg, params, bias, _ = case("v3")
    made = Model(cfg, params, bias)
    before = made.generate(PROMPTS, np.int64(NEW))
    made.balance_bias = -3 * bias
    assert made.generate(PROMPTS, NEW) == Model(cfg, params, -3 * bias).generate(PROMPTS, NEW) != before
    with pytest.raises(ValueError, match=r"stop_ids=\('a', 'b'\) must be token ids"):
        run("v3", stop_ids="ab")


def test_a_process_may_generate_alone(monkeypatch):
    """As the first of several does at the end of training: without a mesh, it asks the others nothing."""
    monkeypatch.setattr(build, "lowest", lambda number: pytest.fail("the others are not there"))
    assert Model(*case("v3")[:3]).generate(PROMPTS, NEW) == run("v3")


def log_softmax(x_nv):
    shifted = x_nv - x_nv.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_log_probabilities_are_the_models_and_the_samplers():
    """The model's own before any setting; the sampler's after penalty, temperature and top-k: in float64, from the logits
    of the full forward pass, which differ from the cache's by float32 rounding (1e-5 of them)."""
    _, _, _, logits = case("v3")
    rows = run("v3", temperature=0.6, top_k=4, repetition_penalty=1.5, seed=1, logprobs=True)
    for prompt, row in zip(PROMPTS, rows, strict=True):
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
    got = run("v3", repetition_penalty=3.0)
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
    first = run("v3")
    stop = next(t for t in first[0] if any(t not in row for row in first[1:]))
    rows = run("v3", stop_ids=[stop], logprobs=True)
    assert [row.finish_reason for row in rows] == ["stop" if stop in row else "length" for row in first]
    assert [len(row.logprobs) for row in rows] == [len(row.tokens) for row in rows]


def test_deep_models_scan_or_unroll_alike(monkeypatch):
    """On CPU layers lie apart; elsewhere deep models scan stacks of layers, and of caches."""
    cfg, params, bias, _ = case("v3")
    cfg = dataclasses.replace(cfg, n_shared_experts=2)
    want = run("v3")
    monkeypatch.setattr(decoding, "unrolled", lambda cfg: False)
    jax.clear_caches()
    got = Model(cfg, params, bias).generate(PROMPTS, NEW)
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
    """Its weights' values, without a conversion at each call."""
    cfg, params, bias, _ = case("v3")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ready = decoding.prepare(half, decoding.decoding_config(dataclasses.replace(cfg, dtype="bfloat16")))
    assert {x.dtype.name for x in jax.tree.leaves(ready["moe_layers"][0]["ffn"])} == {"float32"}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    low = Model(dataclasses.replace(cfg, dtype="bfloat16"), half, bias).generate(PROMPTS, NEW)
    assert low == Model(cfg, exact, bias).generate(PROMPTS, NEW)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 4, "at least one prompt"),
        ([[1], []], 4, "each needs at least one token"),
        ([[1]], 0, "max_new_tokens=0 must be an integer >= 1"),
        ([[1] * 60], 5, r"prompt of 60 tokens \+ max_new_tokens=5 exceeds max_position_embeddings=64"),
        ([[1, 67]], 4, r"token id 67 lies outside \[0, vocab_size=67\)"),
        ([[-1]], 4, "token id -1 lies outside"),
    ],
)
def test_bad_requests(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        run("v3", prompts, new)

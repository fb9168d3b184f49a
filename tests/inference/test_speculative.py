"""Speculative decoding: greedy equals plain greedy, sampling follows the model's own distribution exactly.

Drafts and acceptances are recomputed from a full forward pass over the finished text; distributions are
enumerated from the model's probabilities and compared by chi-square.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax

from deepseek_jax.inference import speculative
from deepseek_jax.inference.batch import Request
from deepseek_jax.inference.driver import complete
from deepseek_jax.inference.generate import generate
from deepseek_jax.inference.sampling import Sampling, keys_at, row_sampling
from deepseek_jax.inference.speculative import Stats, check_speculative, verify
from deepseek_jax.model.modules import DeepSeekV3
from tests.oracle.tiny import V3, weights

CFG = dataclasses.replace(V3, num_hidden_layers=2, max_position_embeddings=128)  # two MTP modules
PROMPTS = [[5, 61, 7], [3, 9, 44, 10, 2, 8, 30, 31, 32], [66], list(range(20, 40))]
NEW = 13
OUTPUTS = ("wo_hvd", "w_down_fd", "w_down_efd")  # the last projection of attention and of the FFNs


def mostly_agreeing(seed: int, share: float):
    """Weights whose MTP modules often guess what the main model says next.

    Blocks add only `share` of their output, so the main model mostly follows the last token; the MTP module
    reads the same token's embedding, and agrees always at share 0.
    """
    params, bias = weights(CFG, seed)

    def scaled(path, x):
        return share * x if path[-1].key in OUTPUTS else x

    params = jax.tree_util.tree_map_with_path(scaled, params)
    mtp, d = params["mtp"], CFG.hidden_size
    embedding_only = np.concatenate([np.eye(d), np.zeros((d, d))]).astype(np.float32)
    mtp["w_eh_cd"] = np.broadcast_to(embedding_only, mtp["w_eh_cd"].shape)
    mtp["enorm_d"] = np.ones_like(mtp["enorm_d"])
    mtp["norm_d"] = np.broadcast_to(params["final_norm"]["scale_d"], mtp["norm_d"].shape)
    return params, bias


@jax.jit
def _full_forward(params, bias, tokens):
    logits, aux = DeepSeekV3(CFG).apply({"params": params}, tokens, balance_bias=bias)
    return logits.argmax(-1), aux.mtp[0].argmax(-1)


def replay(prompt, continuation, drafts, new_tokens, stop_ids):
    """(drafted, accepted) of one row: the algorithm by hand, on a continuation that is already known.

    `drafts[i]` is what the first MTP module says at position i of the text for position i + 2.
    """
    count, drafted, accepted = 1, 0, 0
    while count < new_tokens and continuation[count - 1] not in stop_ids:
        agree = drafts[len(prompt) + count - 2] == continuation[count]
        drafted, accepted = drafted + 1, accepted + agree
        count += 2 if agree and continuation[count] not in stop_ids else 1
    return np.array([drafted, accepted])


def up_to(row, stop_ids):
    return list(itertools.takewhile(lambda token: token not in stop_ids, row))


def generate_speculative(params, cfg, prompts, max_new_tokens, *, balance_bias=None, **options):
    """(new tokens of each prompt, statistics of the drafts)"""
    request = Request(prompts, max_new_tokens, **options)
    rows, state = complete(speculative.speculative(params, cfg, balance_bias), cfg, request)
    return [row.tokens for row in rows], speculative.stats(state)


class Greedy:
    """Plain greedy text of a model for PROMPTS, and its drafts by the full forward pass."""

    def __init__(self, params, bias):
        self.params, self.bias = params, bias
        self.plain = generate(params, CFG, PROMPTS, NEW + 1, balance_bias=bias)
        tokens = np.zeros((len(PROMPTS), 40), np.int32)
        for row, prompt, out in zip(tokens, PROMPTS, self.plain, strict=True):
            row[: len(prompt) + len(out)] = prompt + out
        choices, drafts = _full_forward(params, bias, tokens)
        self.choices, self.drafts = np.asarray(choices), np.asarray(drafts)

    def check(self, new_tokens: int, stop_ids: tuple[int, ...] = ()) -> Stats:
        rows, got = generate_speculative(
            self.params, CFG, PROMPTS, new_tokens, balance_bias=self.bias, stop_ids=stop_ids
        )
        assert rows == [up_to(row[:new_tokens], stop_ids) for row in self.plain]
        parts = [
            replay(prompt, row, drafts, new_tokens, stop_ids)
            for prompt, row, drafts in zip(PROMPTS, self.plain, self.drafts, strict=True)
        ]
        assert (got.drafted, got.accepted) == tuple(np.sum(parts, axis=0))
        self.steps = [int(drafted) for drafted, _ in parts]
        return got


@pytest.fixture(scope="module")
def partly():
    return Greedy(*mostly_agreeing(1, 0.1))


def test_the_oracle_is_the_model(partly):
    for prompt, row, choices in zip(PROMPTS, partly.plain, partly.choices, strict=True):
        assert row == choices[len(prompt) - 1 : len(prompt) + NEW].tolist()


@pytest.mark.parametrize(("seed", "share"), [(0, 0.5), (2, 0.1), (3, 0.3)])
def test_greedy_equals_plain_greedy(seed, share):
    greedy = Greedy(*mostly_agreeing(seed, share))
    got = greedy.check(NEW)
    assert 0 < got.accepted < got.drafted
    assert len({tuple(row) for row in greedy.plain}) == len(PROMPTS)


def test_rows_advance_at_their_own_pace(partly):
    partly.check(NEW)
    assert len(set(partly.steps)) > 2  # else the slots of the rows were never apart


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_few_tokens(partly, new_tokens):
    assert partly.check(new_tokens).drafted == len(PROMPTS) * (new_tokens - 1)


def test_stop_tokens_end_rows_where_plain_greedy_ends_them(partly):
    emitted = [token for row in partly.plain for token in row[1:NEW]]
    chosen = dict.fromkeys(emitted)  # each token once, in order
    assert len(chosen) > 4
    for token in chosen:
        partly.check(NEW, (token,))


def test_a_module_that_always_agrees_halves_the_steps():
    got = Greedy(*mostly_agreeing(0, 0.0)).check(NEW)
    steps = (NEW - 1) // 2  # the first token comes from the prompt, then two per step
    assert got == Stats(drafted=steps * len(PROMPTS), accepted=steps * len(PROMPTS))
    assert (got.acceptance, got.tokens_per_step) == (1.0, 2.0)


def test_stats():
    assert Stats(8, 6).acceptance == 0.75 and Stats(8, 6).tokens_per_step == 1.75
    assert Stats(0, 0).acceptance == 0.0 and Stats(0, 0).tokens_per_step == 1.0


def test_a_model_without_mtp_module_is_refused():
    cfg = dataclasses.replace(CFG, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 0"):
        check_speculative(cfg, Sampling())


# --- sampling ----------------------------------------------------------------------------------------------

SMALL = dataclasses.replace(
    CFG,
    vocab_size=7,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    n_routed_experts=4,
    n_group=2,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
)
IDS = 5  # of the 7; the others must never come out
PROMPT, DEPTH, ROWS = [1, 4, 2], 4, 2048
HOT, NUCLEUS, BEST = Sampling(1.0), Sampling(1.3, 0.9), Sampling(1.2, top_k=4, min_p=0.3)
# A correct sampler fails one seed in a thousand; the seed is fixed, so a pass stays a pass.
P_VALUE = 1e-3


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What `sampling` draws from, in float64: temperature, top-k, the smallest set that reaches top_p, min-p."""
    scaled = logits.astype(np.float64)[..., :IDS] / sampling.temperature
    p = np.exp(scaled - scaled.max(-1, keepdims=True))
    if sampling.top_k:
        p = np.where(p >= np.sort(p, -1)[..., -sampling.top_k, None], p, 0)
    p = p / p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)
    sorted_p = np.take_along_axis(p, order, -1)
    kept = np.cumsum(sorted_p, -1) - sorted_p < sampling.top_p
    p = p * np.take_along_axis(kept, np.argsort(order, axis=-1), -1)
    p = np.where(p >= sampling.min_p * p.max(-1, keepdims=True), p, 0)
    return p / p.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def small():
    """(params, bias, logits [IDS] * (DEPTH - 1) + [DEPTH, v]): after each prefix of every text."""
    params, bias = weights(SMALL, 4)
    prefixes = np.array(list(itertools.product(range(IDS), repeat=DEPTH - 1)))
    tokens = np.concatenate([np.tile(PROMPT, (len(prefixes), 1)), prefixes], axis=1).astype(np.int32)
    logits, _ = jax.jit(DeepSeekV3(SMALL).apply)({"params": params}, tokens, balance_bias=bias)
    logits = np.asarray(logits)[:, len(PROMPT) - 1 :]
    return params, bias, logits.reshape(*[IDS] * (DEPTH - 1), DEPTH, SMALL.vocab_size)


def joint(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Exact probability of every text of DEPTH tokens, [IDS] * DEPTH."""
    p = distribution(logits, sampling)
    total = np.ones([IDS] * DEPTH)
    for i in range(DEPTH):
        first = (slice(None),) * i + (0,) * (DEPTH - 1 - i)  # token i depends on the i tokens before it
        total *= p[(*first, i)].reshape(*[IDS] * (i + 1), *[1] * (DEPTH - 1 - i))
    return total


def p_value(counts: np.ndarray, prob: np.ndarray) -> float:
    """Chi-square goodness of fit; cells of fewer than 5 expected draws are taken together."""
    expected, counts = prob.reshape(-1) * counts.sum(), counts.reshape(-1)
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    pool = lambda x: np.append(x[~rare], x[rare].sum())  # noqa: E731
    expected, counts = pool(expected), pool(counts)
    cells = expected > 0
    return float(stats.chisquare(counts[cells], expected[cells]).pvalue)


def sampled(small, sampling=NUCLEUS) -> np.ndarray:
    """Counts of the texts that speculative sampling gives in one call, [IDS] * DEPTH."""
    params, bias, _ = small
    rows, got = generate_speculative(
        params, SMALL, [PROMPT] * ROWS, DEPTH, balance_bias=bias, sampling=sampling, num_ids=IDS
    )
    assert got.drafted >= ROWS * DEPTH // 2 and got.acceptance > 0.1
    counts = np.zeros([SMALL.vocab_size] * DEPTH, np.int64)
    np.add.at(counts, tuple(np.array(rows).T), 1)
    known = counts[(slice(IDS),) * DEPTH]
    assert known.sum() == ROWS, "an id outside num_ids came out"
    return known


@pytest.mark.parametrize("sampling", [NUCLEUS, BEST], ids=["nucleus", "top_k and min_p"])
def test_sampling_follows_the_main_model(small, sampling):
    want = joint(small[2], sampling)
    assert abs(want.sum() - 1) < 1e-12 and (want == 0).any()
    assert p_value(sampled(small, sampling), want) > P_VALUE


def test_log_probabilities_are_those_of_plain_generation(small):
    """Of the tokens that came out, under the model and under what was sampled, drafts or not."""
    params, bias, logits = small
    request = Request([PROMPT] * 16, DEPTH, BEST, seed=2, num_ids=IDS)
    for row in complete(speculative.speculative(params, SMALL, bias), SMALL, request)[0]:
        assert row.finish_reason == "length" and len(row.tokens) == DEPTH
        x = np.stack([logits[(*row.tokens[:i], *[0] * (DEPTH - 1 - i))][i] for i in range(DEPTH)])
        at = np.arange(DEPTH), row.tokens
        own = np.log(softmax(x.astype(np.float64), axis=-1))
        # Float32 logits of the cache against those of the full pass, 1e-5 of them.
        np.testing.assert_allclose(row.logprobs, own[at], atol=1e-4)
        np.testing.assert_allclose(row.sampled_logprobs, np.log(distribution(x, BEST)[at]), atol=2e-4)


def test_a_repetition_penalty_is_refused():
    with pytest.raises(ValueError, match=r"repetition_penalty=1.1 does not go with speculative decoding"):
        check_speculative(SMALL, Sampling(repetition_penalty=1.1))


def test_greedy_and_sampled_settings_share_a_program(small):
    params, bias, _ = small
    options = {"balance_bias": bias, "num_ids": IDS}
    generate_speculative(params, SMALL, [PROMPT] * 3, DEPTH, **options)
    before = speculative._advance._cache_size()
    generate_speculative(
        params, SMALL, [PROMPT] * 3, 2, sampling=BEST, seed=[1, 2, 3], stop_ids=[4], **options
    )
    assert speculative._advance._cache_size() == before


def _accept_always(accept_keys, replace_keys, target_bv, draft_bv, token_b, sampling):
    return jnp.ones(token_b.shape, bool), token_b


def _replace_from_target(accept_keys, replace_keys, target_bv, draft_bv, token_b, sampling):
    accepted, _ = verify(accept_keys, replace_keys, target_bv, draft_bv, token_b, sampling)
    other = jax.vmap(jax.random.categorical)(replace_keys, target_bv).astype(jnp.int32)
    return accepted, jnp.where(accepted, token_b, other)


def test_the_chi_square_sees_a_verification_that_accepts_always(small, monkeypatch):
    monkeypatch.setattr(speculative, "verify", _accept_always)
    speculative._advance.clear_cache()
    assert p_value(sampled(small), joint(small[2], NUCLEUS)) < 1e-9
    speculative._advance.clear_cache()


# --- verification alone ------------------------------------------------------------------------------------

P = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
Q = np.array([0.1, 0.5, 0.2, 0.0, 0.2])
N = 20_000


def _logits(p: np.ndarray, n: int) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(np.log(p, where=p > 0, out=np.full(5, -np.inf)), jnp.float32), (n, 5))


def _verify(p, q, drafts, sampling=HOT, seed=0, function=verify):
    n = len(drafts)
    rows = row_sampling(sampling, seed, n)
    keys = [keys_at(rows, jnp.zeros(n, jnp.int32), use) for use in (1, 2)]
    accepted, token = jax.jit(function)(
        *keys, _logits(p, n), _logits(q, n), jnp.asarray(drafts, jnp.int32), rows
    )
    return np.asarray(accepted), np.asarray(token)


def test_verify_accepts_with_p_over_q_and_replaces_from_the_rest():
    rest = np.maximum(P - Q, 0) / np.maximum(P - Q, 0).sum()
    for draft in np.flatnonzero(Q):
        accepted, token = _verify(P, Q, np.full(N, draft), seed=int(draft))
        rate = min(1.0, P[draft] / Q[draft])
        assert abs(accepted.mean() - rate) <= 5 * np.sqrt(rate * (1 - rate) / N)
        assert (token[accepted] == draft).all()
        replaced = np.bincount(token[~accepted], minlength=5)
        if replaced.sum():
            assert p_value(replaced, rest) > P_VALUE


@pytest.mark.parametrize(
    ("sampling", "q", "want"),
    [
        (HOT, Q, P),
        # With top_p the draft, too, comes from its nucleus: tokens 1 and 2, not 4, which is as likely as 2.
        (Sampling(1.0, 0.6), np.array([0, 5, 2, 0, 0]) / 7, np.array([4, 3, 0, 0, 0]) / 7),
    ],
    ids=["whole", "nucleus"],
)
def test_verify_gives_the_target_distribution(sampling, q, want):
    drafts = np.random.default_rng(0).choice(5, N, p=q)
    _, token = _verify(P, Q, drafts, sampling)
    assert p_value(np.bincount(token, minlength=5), want) > P_VALUE


@pytest.mark.parametrize("broken", [_accept_always, _replace_from_target])
def test_the_chi_square_sees_a_wrong_rule(broken):
    drafts = np.random.default_rng(0).choice(5, N, p=Q)
    _, token = _verify(P, Q, drafts, function=broken)
    assert p_value(np.bincount(token, minlength=5), P) < 1e-9


def test_verify_accepts_every_draft_of_the_same_distribution():
    drafts = np.random.default_rng(1).choice(5, N, p=Q)
    accepted, token = _verify(Q, Q, drafts)
    assert accepted.all() and (token == drafts).all()


def test_verify_greedy_is_the_main_models_choice():
    accepted, token = _verify(P, Q, np.array([0, 1, 2, 3, 4]), Sampling(0.0))
    assert accepted.tolist() == [True, False, False, False, False] and (token == 0).all()

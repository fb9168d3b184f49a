"""Gate and balancing: each known mistake has an input on which it shows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.router import affinities, balance_stats, only_counted, route, update_bias
from deepseek_jax.model.sequence import WHOLE
from tests.oracle import model as oracle
from tests.oracle.tiny import V2, V3

# Eight experts in four groups of two; two groups stay, two experts are chosen.
CFG = dataclasses.replace(
    V3, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=2, routed_scaling_factor=2.5
)
ROUTE = jax.jit(route, static_argnums=0)
STATS = jax.jit(balance_stats, static_argnums=(0, 3))


def routed(cfg, scores, bias):
    """{expert: gating value} of one token with the given affinities."""
    bias = None if bias is None else np.float32(bias)
    out = ROUTE(cfg, np.float32([[scores]]), bias)
    return dict(zip(out.experts_btk[0, 0].tolist(), out.weights_btk[0, 0].tolist(), strict=True))


def test_gating_values_come_from_unbiased_affinities():
    """A large bias decides who is selected and leaves no trace in the weights."""
    scores = [0.9, 0.8, 0.1, 0.2, 0.5, 0.5, 0.5, 0.5]
    got = routed(CFG, scores, [0, 0, 100, 60, 0, 0, 0, 0])
    assert set(got) == {2, 3}
    assert got[2] == pytest.approx(2.5 * 0.1 / 0.3) and got[3] == pytest.approx(2.5 * 0.2 / 0.3)


def test_masked_groups_are_minus_infinity():
    """All biased affinities are negative: with a mask of 0 the experts of dropped groups would win."""
    scores = [0.5, 0.4, 0.45, 0.35, 0.3, 0.3, 0.2, 0.2]
    assert set(routed(CFG, scores, [-10.0] * 8)) == {0, 2}


def test_group_score_is_the_sum_of_two_with_bias_and_the_maximum_without():
    cfg = dataclasses.replace(CFG, topk_group=1)
    scores = [0.60, 0.01, 0.40, 0.39, 0.1, 0.1, 0.1, 0.1]
    assert set(routed(cfg, scores, np.zeros(8))) == {2, 3}
    softmax = dataclasses.replace(cfg, scoring_func="softmax", norm_topk_prob=False)
    assert set(routed(softmax, scores, None)) == {0, 1}


def test_weights_without_normalisation_are_the_affinities_times_the_factor():
    cfg = dataclasses.replace(CFG, scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=16.0)
    got = routed(cfg, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], None)
    assert got == {0: pytest.approx(4.8), 1: pytest.approx(3.2)}


def test_normalisation_of_vanishing_affinities_stays_finite():
    got = routed(CFG, [0.0] * 8, [1, 1, 0, 0, 0, 0, 0, 0])
    assert set(got.values()) == {0.0}


@pytest.mark.parametrize(
    "cfg", [V3, V2, dataclasses.replace(V3, n_group=1, topk_group=1)], ids=["v3", "v2", "one"]
)
def test_random_tokens_against_the_oracle(cfg):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 40, cfg.hidden_size)).astype(np.float32)
    w = 0.3 * rng.standard_normal((cfg.hidden_size, cfg.n_routed_experts)).astype(np.float32)
    bias = 0.5 * rng.standard_normal(cfg.n_routed_experts).astype(np.float32)
    s = jax.jit(affinities, static_argnums=1)({"w_gate_de": w}, cfg, x)
    out = ROUTE(cfg, s, bias if cfg.has_balance_bias else None)
    stats = STATS(cfg, s, out)
    config, loss, counts = dataclasses.asdict(cfg), 0.0, np.zeros(cfg.n_routed_experts, int)
    for b in range(2):
        rows = []
        for t in range(40):
            ids, values, row = oracle.gate(np.float64(w.T), np.float64(bias), config, np.float64(x[b, t]))
            got = dict(zip(out.experts_btk[b, t].tolist(), out.weights_btk[b, t].tolist(), strict=True))
            assert got == {i: pytest.approx(v, rel=1e-5) for i, v in zip(ids.tolist(), values, strict=True)}
            rows.append(row)
            counts[ids] += 1
        loss += oracle.sequence_loss(np.array(rows), cfg.num_experts_per_tok) / 2
    np.testing.assert_array_equal(stats.counts_e, counts)
    assert float(stats.seq_loss) == pytest.approx(loss, rel=1e-5)


def test_balance_losses_are_one_at_balance():
    cfg = dataclasses.replace(CFG, n_group=1, topk_group=1, num_experts_per_tok=1)
    s = np.full((3, 8, 8), 0.2, np.float32)
    s[:, np.arange(8), np.arange(8)] = 0.9  # token t prefers expert t
    stats = STATS(cfg, s, ROUTE(cfg, s, np.zeros(8, np.float32)))
    assert float(stats.seq_loss) == pytest.approx(1.0, abs=1e-6)
    assert float(stats.classic_loss) == pytest.approx(1.0, abs=1e-6)
    one = np.broadcast_to(s[:, :1], s.shape)  # every token prefers expert 0
    worse = STATS(cfg, one, ROUTE(cfg, one, np.zeros(8, np.float32)))
    assert float(worse.seq_loss) == pytest.approx(8 * 0.9 / (0.9 + 7 * 0.2), rel=1e-5)


def test_sequence_loss_is_per_sequence_and_the_classic_one_is_not():
    """Each sequence uses one half of the experts: unbalanced by itself, balanced over the batch."""
    cfg = dataclasses.replace(CFG, n_group=1, topk_group=1, num_experts_per_tok=1)
    s = np.full((2, 4, 8), 1e-6, np.float32)
    for b in range(2):
        s[b, np.arange(4), 4 * b + np.arange(4)] = 1.0
    stats = STATS(cfg, s, ROUTE(cfg, s, np.zeros(8, np.float32)))
    assert float(stats.seq_loss) == pytest.approx(2.0, rel=1e-4)
    assert float(stats.classic_loss) == pytest.approx(1.0, rel=1e-4)


def test_bias_moves_by_exactly_gamma_against_the_load():
    counts = jnp.array([[4, 2, 0], [5, 5, 5]], jnp.int32)
    got = update_bias(jnp.zeros((2, 3)), counts, 0.001)
    np.testing.assert_array_equal(got, np.float32([[-0.001, 0.0, 0.001], [0.0, 0.0, 0.0]]))


def far_from_int32(counts):
    """The rule in integers of any size."""
    return [[(c * len(row) > sum(row)) - (c * len(row) < sum(row)) for c in row] for row in counts.tolist()]


def test_bias_at_the_reports_batch():
    """15,360 x 4,096 tokens, 8 of 256 experts each: a count times 256, or the sum of all, does not fit into an int32."""
    tokens, e, k = 15_360 * 4_096, 256, 8
    mean = tokens * k // e
    balanced = np.full(e, mean)
    one_above = balanced + np.eye(e, dtype=int)[3] - np.eye(e, dtype=int)[4]
    collapsed = np.where(np.arange(e) < k, tokens, 0)  # every token to the same eight experts
    crowded = np.concatenate([[tokens // 5], np.full(e - 1, (tokens * k - tokens // 5) // (e - 1))])
    twice = np.full(e, 2**31 - 1) - np.arange(e)  # a sum of 2^39
    counts = np.stack([balanced, one_above, collapsed, crowded, twice])
    got = update_bias(jnp.zeros(counts.shape), jnp.asarray(counts, jnp.int32), 1.0)
    np.testing.assert_array_equal(got, -np.float32(far_from_int32(counts)))


def test_bias_of_random_counts():
    """Small ones too, where counts lie at the mean, or just beside one that is no integer."""
    counts = np.random.default_rng(0).integers(0, 4, (200, 6))
    got = update_bias(jnp.zeros(counts.shape), jnp.asarray(counts, jnp.int32), 1.0)
    np.testing.assert_array_equal(got, -np.float32(far_from_int32(counts)))


def test_tokens_that_do_not_count_have_no_load():
    """The statistics of a batch with masked tokens are those of the tokens left, and none of them is routed."""
    s = np.random.default_rng(0).uniform(0.1, 0.9, (2, 12, 8)).astype(np.float32)
    counted = np.arange(12)[None] < np.array([[9], [9]])
    routing = ROUTE(CFG, s, np.zeros(8, np.float32))
    masked = only_counted(CFG, routing, counted)
    assert (np.asarray(masked.experts_btk)[~counted] == 8).all()
    got = STATS(CFG, s, masked, WHOLE, counted)
    want = STATS(CFG, s[:, :9], ROUTE(CFG, s[:, :9], np.zeros(8, np.float32)))
    np.testing.assert_array_equal(got.counts_e, want.counts_e)
    np.testing.assert_allclose(got[1:3], want[1:3], rtol=1e-6)


def test_no_gradient_reaches_the_bias_or_the_selection():
    def weight_sum(s, bias):
        return route(CFG, s, bias).weights_btk[..., 0].sum()

    s = np.random.default_rng(0).uniform(size=(1, 3, 8)).astype(np.float32)
    ds, dbias = jax.jit(jax.grad(weight_sum, (0, 1)))(s, np.zeros(8, np.float32))
    assert (np.asarray(dbias) == 0).all()
    chosen = np.asarray(ROUTE(CFG, s, np.zeros(8, np.float32)).experts_btk)
    for t in range(3):
        assert set(np.flatnonzero(ds[0, t])) == set(chosen[0, t])

"""Routed experts in FP8 against one expert at a time in NumPy, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model import experts
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.rows import num_rows
from deepseek_jax.parallel.exchange.wire import decode, encode
from deepseek_jax.precision import PRESETS
from deepseek_jax.precision.product import Plain, Quantised, quantise_weight
from tests.precision import oracle

E, D, F, K, N = 5, 136, 72, 2, 190
RNG = np.random.default_rng(2)
X, DY = (
    RNG.standard_normal((N, D)).astype(np.float32) * np.exp(RNG.normal(0, 1, (N, 1))).astype(np.float32)
    for _ in "xy"
)
W = {
    name: (RNG.standard_normal((E, *shape)) / 10).astype(np.float32)
    for name, shape in (("w_gate_edf", (D, F)), ("w_up_edf", (D, F)), ("w_down_efd", (F, D)))
}
GAIN = RNG.uniform(0.1, 1, (N, K)).astype(np.float32)
ROUTINGS = {
    "random": np.stack([RNG.permutation(E)[:K] for _ in range(N)]),
    "one_takes_all": np.full((N, K), 3),
    "absent": RNG.integers(-1, E + 1, (N, K)),
}


def expected(policy, ids):
    """y and gradients of x, gains and weights, float64: tiles of the tokens of one expert, as they lie in its rows."""
    f32 = np.float32
    y, dx, dgain = np.zeros((N, D)), np.zeros((N, D)), np.zeros((N, K))
    dw = {name: np.zeros(w.shape) for name, w in W.items()}
    x_kept, dy_kept = (oracle.rounded(a, policy.expert_input) for a in (X, DY))
    for e in range(E):
        token, slot = np.nonzero(ids == e)  # stable: by token, then slot
        if not len(token):
            continue
        gate_w, up_w, down_w = (W[name][e] for name in W)
        gain = GAIN[token, slot][:, None]
        into = (policy.expert_input, policy.fprop[1])
        gate, up = (f32(oracle.product(x_kept[token], w.T, into)[0]) for w in (gate_w, up_w))
        out = oracle.product(oracle.silu(gate) * up * gain, down_w.T, policy.fprop)[0]
        np.add.at(y, token, f32(out))
        gate, up = (f32(oracle.rounded(a, policy.fprop[0])) for a in (gate, up))
        dact = oracle.product(dy_kept[token], down_w, (policy.expert_input, policy.dgrad[1]))[0]
        act = oracle.silu(gate) * up
        dgain[token, slot] = (dact * act).sum(-1)
        d_gate, d_up = (f32(d) for d in oracle.swiglu_backward(gate, up, dact * gain))
        back = [oracle.product(d, w, policy.dgrad)[0] for d, w in ((d_gate, gate_w), (d_up, up_w))]
        np.add.at(dx, token, sum(back))
        for name, a, b in (
            ("w_gate_edf", x_kept[token], d_gate),
            ("w_up_edf", x_kept[token], d_up),
            ("w_down_efd", act * gain, dy_kept[token]),
        ):
            dw[name][e] = oracle.product(a.T, b.T, policy.wgrad)[0]
    return y, dx, dgain, dw


def run(policy, came=None):
    """`came`: the tokens quantised, beside x."""

    @jax.jit
    def value_and_grad(x, gain, ids, dy):
        p = {
            name: Quantised(jnp.asarray(w), *quantise_weight(jnp.asarray(w), policy), policy)
            for name, w in W.items()
        }
        y, vjp = jax.vjp(
            lambda x, gain, p: routed_experts(p, x, ids, gain, sent=came, form=policy.dispatch), x, gain, p
        )
        dx, dgain, dp = vjp(dy)
        return y, dx, dgain, {name: dp[name].master for name in W}

    return value_and_grad


@pytest.fixture(scope="module")
def deepseek():
    return run(PRESETS["deepseek_fp8"])


@pytest.fixture(scope="module")
def unquantised():
    """y and gradients of x, gains and weights of the random routing."""

    @jax.jit
    def value_and_grad(x, gain, p, ids, dy):
        y, vjp = jax.vjp(lambda x, gain, p: routed_experts(p, x, ids, gain), x, gain, p)
        return y, *vjp(dy)

    return jax.device_get(value_and_grad(X, GAIN, W, ROUTINGS["random"].astype(np.int32), DY))


def close(got, want):
    # as in test_linear.test_ffn: float32 noise over E4M3's rounding boundaries
    np.testing.assert_array_less(np.linalg.norm(np.asarray(got) - want), 3.5e-4 * np.linalg.norm(want))


@pytest.mark.parametrize("kind", ROUTINGS)
def test_against_one_expert_at_a_time(deepseek, kind):
    ids = ROUTINGS[kind].astype(np.int32)
    jax.tree.map(close, deepseek(X, GAIN, ids, DY), expected(PRESETS["deepseek_fp8"], ids))


@pytest.mark.parametrize("name", ["per_token_channel", "per_tensor", "block_wise_grads"])
def test_other_presets_stay_near_the_unquantised_experts(deepseek, unquantised, name):
    """Their scales span rows of several experts, so no expert can be checked alone. On Gaussian data every preset has
    the error of E4M3's mantissa: that of the preset which is checked exactly, give or take half."""
    ids = ROUTINGS["random"].astype(np.int32)

    def errors(results):
        pairs = zip(jax.tree.leaves(results), jax.tree.leaves(unquantised), strict=True)
        return np.array([np.linalg.norm(got - want) / np.linalg.norm(want) for got, want in pairs])

    ratio = errors(run(PRESETS[name])(X, GAIN, ids, DY)) / errors(deepseek(X, GAIN, ids, DY))
    assert np.all((ratio > 0.5) & (ratio < 1.5))


def test_tokens_that_came_quantised_are_taken_as_they_are():
    """Bit for bit what the quantised tokens give when the expert quantises them again; x itself is not read."""
    policy, ids = PRESETS["deepseek_fp8"], ROUTINGS["absent"]
    came = encode(X, policy.dispatch)
    again = run(policy)(decode(came, policy.dispatch, jnp.float32), GAIN, ids, DY)
    taken = run(policy, came)(np.full_like(X, np.nan), GAIN, ids, DY)
    jax.tree.map(np.testing.assert_array_equal, taken, again)


def test_a_format_that_the_experts_do_not_have_is_dequantised():
    """Scales of powers of two are wanted; and plain experts read no quantised tokens."""
    policy, x = PRESETS["deepseek_fp8"], jnp.asarray(X)
    w = Quantised(jnp.ones((1, D, F)), *quantise_weight(jnp.ones((1, D, F)), policy), policy)
    sent = encode(x, "fp8")
    want = w.from_dispatch(x)
    jax.tree.map(np.testing.assert_array_equal, w.from_dispatch(x, sent, "fp8"), want)
    assert w.from_dispatch(x, sent, policy.dispatch).q is sent[0]
    assert Plain(w.master).from_dispatch(x, sent, policy.dispatch) is x


def test_tokens_travel_in_a_format_that_the_experts_of_each_preset_can_read():
    """Scales per 128 channels are no scales of a row or of a tensor: those presets dispatch in BF16."""
    for policy in filter(None, PRESETS.values()):
        tiles = policy.expert_input.fine and policy.expert_input.rows == 1
        assert policy.dispatch == ("fp8_ue8m0" if tiles else "bf16"), policy.name


@pytest.mark.parametrize("name", ["bf16", "deepseek_fp8"])
def test_rows_are_kept_where_they_are_hardly_more_than_the_tokens(name, monkeypatch):
    """The backward pass reads the rows of the forward pass or makes them again of the tokens: bit for bit the same."""
    n, d, f, e = 1024, 256, 128, 2
    policy, rng = PRESETS[name], np.random.default_rng(4)
    x, dy = (jnp.asarray(rng.standard_normal((n, d)), jnp.float32) for _ in "xy")
    ids = jnp.asarray(rng.integers(-1, e, (n, 1)), jnp.int32)
    w = {
        key: jnp.asarray(rng.standard_normal((e, *shape)) / 10, jnp.float32)
        for key, shape in (("w_gate_edf", (d, f)), ("w_up_edf", (d, f)), ("w_down_efd", (f, d)))
    }
    p = {k: Quantised(v, *quantise_weight(v, policy), policy) for k, v in w.items()} if policy else w

    def kept_and_gradients():
        _, vjp = jax.vjp(lambda x, p: routed_experts(p, x, ids, jnp.ones((n, 1))), x, p)
        return {len(leaf) for leaf in jax.tree.leaves(vjp) if leaf.shape[1:] == (d,)}, vjp(dy)

    rows = num_rows(n, e)
    kept, gradients = kept_and_gradients()
    assert rows in kept and n not in kept
    monkeypatch.setattr(experts, "_keeps_rows", lambda rows: False)
    kept, again = kept_and_gradients()
    assert n in kept and rows not in kept
    jax.tree.map(np.testing.assert_array_equal, gradients, again)

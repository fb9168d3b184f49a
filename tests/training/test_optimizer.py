"""AdamW against a float64 NumPy oracle and optax, clipping, the decay mask, the guard against non-finite steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.config import OptimizerConfig
from deepseek_jax.training.optimizer import adamw, apply_if_finite, decay_matrices, global_norm
from deepseek_jax.training.state import TrainState

SHAPES = {"layers": {"wq_a": (2, 3, 5), "attn_norm_scale": (2, 3)}, "norm": {"scale": (3,)}, "embed": (7, 3)}
DECAYS = {"layers": {"wq_a": True, "attn_norm_scale": False}, "norm": {"scale": False}, "embed": True}


def random_tree(seed: int, scale: float = 1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: (scale * rng.standard_normal(s)).astype(dtype), SHAPES, is_leaf=is_shape)


def oracle(grads_per_step, params, c: OptimizerConfig, lr: float):
    """Loshchilov & Hutter's AdamW in float64, gradients clipped by global norm; returns params and moments."""
    p = jax.tree.map(np.float64, params)
    mu, nu = jax.tree.map(np.zeros_like, p), jax.tree.map(np.zeros_like, p)
    for t, grads in enumerate(grads_per_step, start=1):
        g = jax.tree.map(np.float64, grads)
        norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x, n=norm: x * min(1.0, c.clip_norm / n), g)
        mu = jax.tree.map(lambda m, x: c.b1 * m + (1 - c.b1) * x, mu, g)
        nu = jax.tree.map(lambda v, x: c.b2 * v + (1 - c.b2) * x * x, nu, g)
        p = jax.tree.map(
            lambda w, m, v, d, t=t: (
                w - lr * (m / (1 - c.b1**t) / (np.sqrt(v / (1 - c.b2**t)) + c.eps) + d * c.weight_decay * w)
            ),
            p,
            mu,
            nu,
            DECAYS,
        )
    return p, mu, nu


def run(grads_per_step, params, c: OptimizerConfig, lr: float):
    optimizer = adamw(c)
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)

    @jax.jit
    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params, lr=jnp.float32(lr))
        return optax.apply_updates(params, updates), state

    for grads in grads_per_step:
        params, state = step(grads, state, params)
    return params, state


@pytest.fixture(scope="module")
def steps():
    # norms around 7 (clipped) and around 0.7 (not clipped)
    return [random_tree(seed, scale) for seed, scale in enumerate([1.0, 0.1, 1.0, 0.1, 0.02])]


def assert_close(actual, expected, rtol, atol=0.0):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.float64(a), e, rtol=rtol, atol=atol), actual, expected
    )


def test_float32_moments_equal_the_float64_oracle(steps):
    c, params = OptimizerConfig(moment_dtype="float32"), random_tree(99)
    got, state = run(steps, params, c, lr=1e-2)
    want, mu, nu = oracle(steps, params, c, lr=1e-2)
    # float32: a few roundings of 6e-8 per step in the params; the moments may cancel, so absolute to their size
    assert_close(got, want, rtol=2e-6, atol=2e-7)
    assert_close(state.mu, mu, rtol=1e-5, atol=1e-7)
    assert_close(state.nu, nu, rtol=1e-5)
    assert int(state.num_updates) == len(steps)


def test_bfloat16_moments_are_stored_rounded_and_computed_in_float32(steps):
    c, params, lr = OptimizerConfig(), random_tree(99), 1e-2
    got, state = run(steps, params, c, lr)
    want, mu, nu = oracle(steps, params, c, lr)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((state.mu, state.nu)))
    # Relative rounding error of bfloat16 is 2^-8 per store, damped by b1, b2: at most 2^-8 / (1 - b) in all.
    assert_close(state.nu, nu, rtol=2**-8 / (1 - c.b2))
    largest = max(np.abs(m).max() for m in jax.tree.leaves(mu))
    assert_close(state.mu, mu, rtol=0, atol=2**-8 / (1 - c.b1) * largest)
    # One step moves a weight by about lr; its error is a few per cent of that.
    assert_close(got, want, rtol=0, atol=0.05 * lr * len(steps))


def test_the_step_uses_the_moments_as_stored(steps):
    """First step: mu and nu round once each, so the step errs by up to 2^-8 and half of 2^-8."""
    c, params, lr = OptimizerConfig(weight_decay=0.0), random_tree(99), 1e-2
    first, state = run(steps[:1], params, c, lr)
    got = jax.tree.map(lambda new, old: np.float64(new) - np.float64(old), first, params)
    from_stored = jax.tree.map(
        lambda m, v: -lr * np.float64(m) / (1 - c.b1) / (np.sqrt(np.float64(v) / (1 - c.b2)) + c.eps),
        state.mu,
        state.nu,
    )
    exact = jax.tree.map(lambda new, old: new - old, oracle(steps[:1], params, c, lr)[0], params)
    assert_close(got, from_stored, rtol=1e-5, atol=3e-7)  # atol: the params' own float32
    assert_close(got, exact, rtol=1.51 * 2**-8, atol=3e-7)


def test_equals_optax_where_optax_can_say_it(steps):
    c, params = OptimizerConfig(moment_dtype="float32"), random_tree(99)
    reference = optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.adamw(1e-2, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decay_matrices),
    )
    want = jax.tree.map(jnp.asarray, params)
    state = reference.init(want)
    update = jax.jit(reference.update)
    for grads in steps:
        updates, state = update(grads, state, want)
        want = optax.apply_updates(want, updates)
    assert_close(run(steps, params, c, lr=1e-2)[0], jax.tree.map(np.float64, want), rtol=2e-6, atol=2e-7)


def test_decay_covers_matrices_but_not_norm_scales():
    assert decay_matrices(random_tree(0)) == DECAYS
    optimizer, params = adamw(OptimizerConfig()), random_tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params, 0.5)
    np.testing.assert_allclose(updates["embed"], -0.5 * 0.1 * params["embed"], rtol=1e-6)
    np.testing.assert_array_equal(updates["layers"]["attn_norm_scale"], 0.0)


def test_a_mask_can_be_chosen():
    optimizer, params = (
        adamw(OptimizerConfig(), mask=lambda p: jax.tree.map(lambda _: False, p)),
        random_tree(0),
    )
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params, 0.5)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))


def test_global_norm():
    tree = random_tree(3, 10.0)
    want = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(tree)))
    np.testing.assert_allclose(global_norm(tree), want, rtol=1e-6)
    assert global_norm(jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)).dtype == jnp.float32


def test_a_given_norm_is_used():
    optimizer, params, grads = adamw(OptimizerConfig(moment_dtype="float32")), random_tree(0), random_tree(1)
    state = optimizer.init(params)
    _, halved = optimizer.update(grads, state, params, 0.1, grad_norm=jnp.float32(2.0))
    np.testing.assert_allclose(halved.mu["embed"], 0.1 * 0.5 * grads["embed"], rtol=1e-5)


def test_update_without_lr_is_refused():
    optimizer, params = adamw(OptimizerConfig()), random_tree(0)
    with pytest.raises(ValueError, match=r"needs params .* and lr"):
        optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_step_changes_nothing_bitwise(bad):
    optimizer = adamw(OptimizerConfig())
    params = jax.tree.map(jnp.asarray, random_tree(0))
    params["embed"] = params["embed"].at[0, 0].set(-0.0)
    state = TrainState.create(params, optimizer.init(params), jnp.zeros((2, 4)))
    good, poisoned = random_tree(1), random_tree(1)
    poisoned["layers"]["wq_a"][0, 0, 0] = bad

    @jax.jit
    def step(state, grads):
        norm = global_norm(grads)
        finite = jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, 0.1, norm, finite)
        bias = apply_if_finite(state.balance_bias + norm, state.balance_bias, finite)
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state, balance_bias=bias)

    bits = lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}")  # noqa: E731
    state = step(state, good)  # moments that are not zero
    skipped, applied = step(state, poisoned), step(state, good)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), skipped, state)
    assert int(applied.opt_state.num_updates) == 2
    assert not np.array_equal(applied.params["embed"], state.params["embed"])
    assert not np.array_equal(applied.balance_bias, state.balance_bias)


def test_donated_moments_are_updated_in_place():
    """No copy of a whole leaf in the compiled step: its memory traffic is what the optimizer costs on CPU."""
    optimizer, params = adamw(OptimizerConfig()), {"w": jnp.ones((64, 48))}

    def step(params, state, grads):
        norm = global_norm(grads)
        updates, state = optimizer.update(grads, state, params, 0.1, norm, jnp.isfinite(norm))
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params), params)
    entry = lowered.compile().as_text().split("ENTRY")[1]
    assert "[64,48]" in entry
    assert not [line for line in entry.splitlines() if "[64,48]" in line and " copy(" in line]


def test_the_state_has_no_buffer_twice():
    params = jax.tree.map(jnp.asarray, random_tree(0))
    state = TrainState.create(params, adamw(OptimizerConfig()).init(params), jnp.zeros((2, 4)))
    donated = jax.jit(lambda s: s.replace(step=s.step + 1), donate_argnums=0)(
        state
    )  # raises on shared buffers
    assert int(donated.step) == 1

"""The host-side average: value, donation of the averaged arrays, resumption."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.training.ema import EMA


def tree(seed: int, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.standard_normal((3, 4)), dtype),
        "norm": {"scale": jnp.asarray(rng.standard_normal(5), dtype)},
    }


@pytest.fixture
def make():
    made = []

    def make_ema(*args):
        made.append(EMA(*args))
        return made[-1]

    yield make_ema
    for ema in made:
        ema.close()


def test_is_the_normalised_weighted_sum_of_the_snapshots(make):
    decay, ema = 0.9, make(tree(0), 0.9)
    for seed in range(1, 8):
        ema.update(tree(seed))
    weights = decay ** np.arange(6, -1, -1, dtype=np.float64)
    for key in ("w", ("norm", "scale")):
        pick = lambda t, k=key: np.float64(t["w"] if k == "w" else t["norm"]["scale"])  # noqa: E731
        want = sum(w * pick(tree(seed)) for w, seed in zip(weights, range(1, 8), strict=True)) / weights.sum()
        np.testing.assert_allclose(pick(ema.value()), want, rtol=0, atol=1e-6)


def test_before_the_first_update_it_is_the_initial_value_and_after_it_the_snapshot(make):
    ema = make(tree(0), 0.999)
    jax.tree.map(np.testing.assert_array_equal, ema.value(), tree(0))
    ema.update(tree(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), ema.value(), tree(1))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(ema.value()))


def test_bfloat16_parameters_are_averaged_in_float32(make):
    ema = make(tree(0, jnp.bfloat16), 0.5)
    ema.update(tree(1, jnp.bfloat16))
    ema.update(tree(2, jnp.bfloat16))
    want = (np.float64(tree(1, jnp.bfloat16)["w"]) + 2 * np.float64(tree(2, jnp.bfloat16)["w"])) / 3
    np.testing.assert_allclose(ema.value()["w"], want, atol=1e-6)


def test_parameters_may_be_donated_right_after_update(make):
    """A loop of donated steps that overwrites the parameters while the average is taken of every one of them."""
    step = jax.jit(lambda x: x * -1.5 + 1.0, donate_argnums=0)
    x, ema = jnp.ones((512, 512)), make(jnp.zeros((512, 512)), 0.5)
    expected, average, weights = 1.0, 0.0, 0.0
    for _ in range(12):
        ema.update(x)
        average, weights = 0.5 * average + expected, 0.5 * weights + 1.0
        donated, x = x, step(x)
        assert donated.is_deleted()
        expected = expected * -1.5 + 1.0
    np.testing.assert_allclose(ema.value(), average / weights, rtol=1e-5)


def test_update_does_not_wait_for_the_arithmetic(make):
    ema, release = make(tree(0), 0.9), threading.Event()
    ema._worker.submit(release.wait)  # the thread is busy
    ema.update(tree(1))  # returns all the same
    release.set()
    ema.wait()
    np.testing.assert_allclose(ema.value()["w"], tree(1)["w"], atol=1e-6)


def test_resumed_average_is_bitwise_the_uninterrupted_one(make):
    whole, first = make(tree(0), 0.99), make(tree(0), 0.99)
    for seed in range(1, 7):
        whole.update(tree(seed))
    for seed in range(1, 4):
        first.update(tree(seed))
    second = make(first.state()["params"], 0.99, first.state()["updates"])
    for seed in range(4, 7):
        second.update(tree(seed))
    jax.tree.map(np.testing.assert_array_equal, second.state(), whole.state())


def test_bad_steps_and_snapshots_that_are_not_finite_are_left_out(make):
    ema, want = make(tree(0), 0.9), make(tree(0), 0.9)
    for seed in (1, 2, 3, 4):
        poisoned = tree(seed) | {"w": tree(seed)["w"].at[1, 2].set({2: np.nan, 3: np.inf}.get(seed, 0.5))}
        ema.update(poisoned, jnp.asarray(seed != 4))
        if seed == 1:
            want.update(poisoned)
    jax.tree.map(np.testing.assert_array_equal, ema.state(), want.state())
    assert ema.state()["updates"] == 1


def test_state_is_a_copy(make):
    ema = make(tree(0), 0.9)
    ema.update(tree(1))
    before = ema.state()
    kept = jax.tree.map(np.copy, before)
    ema.update(tree(2))
    ema.wait()
    jax.tree.map(np.testing.assert_array_equal, before, kept)


def test_mistakes_are_named(make):
    with pytest.raises(ValueError, match=r"decay=1.0 must lie in \[0, 1\)"):
        EMA(tree(0), 1.0)
    ema = make(tree(0), 0.9)
    with pytest.raises(ValueError, match=r"EMA.update got arrays of shapes .*7"):
        ema.update({"w": jnp.ones(7)})

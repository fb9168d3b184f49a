"""How near a program over several devices must come to that of one."""

import chex
import jax
import numpy as np

# Float32: each side rounds each of the some 20 operations along a gradient's path (6e-8 each) and sums up to 3
# experts, or 48 tokens of a weight, in an order of its own; errors of random sign in a norm grow like the root of
# their number, sqrt(20 + 48) * 6e-8 = 5e-7 per side, 7e-7 for both. Twice that and a half for sums that cancel: the
# gradient of a norm's 16 scales comes to 1.1e-6, depending on how the machine's cores divide a product.
BOUND = 2e-6


def difference(got, want):
    """Norm of the difference by norm of what is wanted; 0 wanted is to be 0."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not want.any():
        return 0.0 if not got.any() else np.inf
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def assert_same_step(run, one) -> None:
    """Loss and every gradient of the first step within BOUND, by the norm of each tensor; counts and the router's bias
    exactly.

    Of runs with float32 moments: the first moment shows the gradient itself.
    """
    (state, _, (got, *_)), (state_1, _, (want, *_)) = run, one
    for name, x in want.scalars.items():
        assert difference(got.scalars[name], x) < BOUND, name
    np.testing.assert_array_equal(got.counts_le, want.counts_le)
    np.testing.assert_array_equal(state.balance_bias, state_1.balance_bias)
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state.mu)
    for (path, x), y in zip(moments, jax.tree.leaves(state_1.opt_state.mu), strict=True):
        assert difference(x, y) < BOUND, jax.tree_util.keystr(path)


def assert_restored(got, want, like) -> None:
    """The arrays of `want` to the bit, lying as those of `like` do."""
    chex.assert_trees_all_equal(got, want)
    assert [x.sharding for x in jax.tree.leaves(got)] == [x.sharding for x in jax.tree.leaves(like)]


def distance(state, other) -> float:
    """Of all weights."""
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True)
    return np.sqrt(sum(np.square(np.subtract(x, y, dtype=np.float64)).sum() for x, y in pairs))


def assert_tracks(run, one, near, bias: float, whats=("loss",)) -> None:
    """A run against that of one device, and against one of one device that starts BOUND off.

    Weights end nearer to one device's than those of the latter do: AdamW divides by the gradient's size, so what
    rounding does to small gradients grows, and such a run says by how much. The router's bias, moved by more than
    `bias`, and the counts are the same; in each step, so are the metrics `whats` within BOUND.
    """
    for step, (got, want) in enumerate(zip(run.history, one.history, strict=True)):
        for what in whats:
            assert difference(got.scalars[what], want.scalars[what]) < BOUND, (step, what)
        np.testing.assert_array_equal(got.counts_le, want.counts_le, err_msg=str(step))
    state, state_1, state_near = (jax.device_get(x.last) for x in (run, one, near))
    np.testing.assert_array_equal(state.balance_bias, state_1.balance_bias)
    assert np.abs(state_1.balance_bias).max() > bias
    assert distance(state, state_1) < distance(state_near, state_1) < 1e-3

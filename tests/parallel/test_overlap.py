"""Two halves of a batch in flight: the run of the whole batch."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import batch_sharding, make_mesh
from deepseek_jax.training.sharding import state_shardings
from deepseek_jax.training.state import Hyper
from deepseek_jax.training.step import make_train_step
from tests.parallel.test_experts_mesh import BOUND, UNOPTIMISED, difference
from tests.tiny_run import fresh_state, tiny, tokens

HYPER = Hyper(np.float32(3e-3), np.float32(0.01), np.float32(0.3))
MODEL = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.2,
}


def config(batch=16, balance="loss_free", model=MODEL, train=None, **mesh):
    return tiny(
        model=model,
        data={"seq_len": 8},
        train={"batch_size": batch} | (train or {}),
        balance={"mode": balance},
        optimizer={"moment_dtype": "float32"},  # the first moment shows the gradient itself
        mesh={"data": 1, "node": 4, "local": 2} | mesh,
    )


@functools.cache
def run(overlap, balance="loss_free", receive=0.0):
    cfg = config(overlap=overlap, balance=balance, receive=receive)
    mesh = make_mesh(cfg.mesh, jax.devices()[:8])
    args = (
        jax.device_put(fresh_state(cfg), state_shardings(cfg, mesh)),
        jax.device_put({"tokens": tokens(cfg)}, batch_sharding(mesh)),
        HYPER,
    )
    return jax.device_get(make_train_step(cfg, mesh).lower(*args).compile(UNOPTIMISED)(*args))


@pytest.mark.parametrize(
    ("balance", "receive"), [("loss_free", 0.0), ("classic", 1.0)], ids=["at once", "classic loss, in rounds"]
)
def test_loss_every_gradient_and_counts_equal_the_whole_batch(balance, receive):
    """Each gradient is a sum over the same tokens; what differs is the order. Bound: see `test_experts_mesh`."""
    (state, metrics), (state_1, metrics_1) = run(True, balance, receive), run(False, balance)
    for name in ("loss", "balance_loss", "grad_norm"):
        assert difference(getattr(metrics, name), getattr(metrics_1, name)) < BOUND, name
    np.testing.assert_array_equal(metrics.counts_le, metrics_1.counts_le)
    np.testing.assert_array_equal(state.balance_bias, state_1.balance_bias)
    moments, moments_1 = state.opt_state.mu, state_1.opt_state.mu
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(moments), jax.tree.leaves(moments_1), strict=True
    ):
        assert np.isfinite(x).all() and difference(x, y) < BOUND, jax.tree_util.keystr(path)

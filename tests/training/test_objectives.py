"""The objective and the computation of its gradients are arguments of the step; what does not count counts nowhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.layout import single_device
from deepseek_jax.model.loss import token_logprobs
from deepseek_jax.parallel.layout import layout_over
from deepseek_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from deepseek_jax.training.feeding import Feed
from deepseek_jax.training.gradients import by_micro_batches, value_of
from deepseek_jax.training.labels import check, targets, totals
from deepseek_jax.training.objectives import pretraining
from deepseek_jax.training.step import make_train_step
from tests.oracle.tiny import weights
from tests.tiny_run import HYPER, fresh_state, tiny, tokens

# As in test_step: float32 sums in another order.
REORDERED = 1e-5
FLOAT32_MOMENTS = {"moment_dtype": "float32"}  # the first moment shows the gradient itself


def masked(cfg):
    """A batch of four conversations: a prompt does not count, and padding follows the answer. One sequence
    is nothing but padding, and no two devices or micro-batches have as many labels."""
    batch = {"tokens": tokens(cfg)}
    at = np.arange(cfg.data.seq_len + 1)
    prompt, length = np.array([[9], [2], [12], [5]]), np.array([[20], [33], [27], [0]])
    return batch | {"loss_mask": at >= prompt, "padding": at >= length}


def after_one_step(cfg, batch, devices):
    mesh = make_mesh(cfg.mesh, jax.devices()[:devices])
    state = jax.device_put(fresh_state(cfg), replicated(mesh))
    return make_train_step(cfg, mesh)(state, jax.device_put(batch, batch_sharding(mesh)), HYPER)


def test_means_over_what_counts_whatever_the_devices_and_micro_batches():
    cfg = tiny(optimizer=FLOAT32_MOMENTS, model={"initializer_range": 0.2})
    batch = masked(cfg)
    counted = targets(batch, cfg.data.seq_len, 0)[1].sum(1)
    assert len(set(counted.tolist())) == 4 and counted[-1] == 0
    state, metrics = after_one_step(cfg, batch, 1)
    halves = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, grad_accumulation=2))
    other, others = after_one_step(halves, batch, 2)
    for name, x in metrics.scalars.items():
        np.testing.assert_allclose(others.scalars[name], x, rtol=REORDERED, err_msg=name)
    np.testing.assert_array_equal(others.counts_le, metrics.counts_le)
    for x, y in zip(
        *map(jax.tree.leaves, jax.device_get((other.opt_state.mu, state.opt_state.mu))), strict=True
    ):
        assert np.linalg.norm(x - y) < REORDERED * np.linalg.norm(y)


@pytest.mark.parametrize("mode", ["loss_free", "classic"])
def test_padding_is_not_there(mode):
    """Windows of 12 tokens with any others after them, and a sequence of padding, give what 12 tokens give."""
    model = {"num_nextn_predict_layers": 2}
    cfg = tiny(model=model, data={"seq_len": 12}, balance={"mode": mode})
    wide = tiny(model=model, data={"seq_len": 16}, balance={"mode": mode})
    params, _ = weights(cfg.model, 3)
    bias = np.random.default_rng(2).normal(0, 0.1, cfg.model.balance_bias_shape).astype(np.float32)
    long = tokens(wide, size=4)
    padding = (np.arange(17) >= 12) | (np.arange(4) == 3)[:, None]
    short = {"tokens": long[:3, :13], "loss_mask": np.broadcast_to(np.arange(13) < 12, (3, 13))}

    def run(cfg, batch):
        total = totals(cfg, batch, len(batch["tokens"]))
        return value_of(cfg, single_device(), pretraining(cfg))(params, batch, bias, total, HYPER)

    (want, parts), (got, padded) = (
        jax.jit(run, static_argnums=0)(*args)
        for args in ((cfg, short), (wide, {"tokens": long, "padding": padding}))
    )
    np.testing.assert_allclose(got, want, rtol=REORDERED)
    np.testing.assert_array_equal(padded.counts_le, parts.counts_le)
    for name, x in parts.metrics.items():
        assert x > 0
        np.testing.assert_allclose(padded.metrics[name], x, rtol=REORDERED, err_msg=name)


def test_a_ramp_fills_up_arrays_of_any_rank():
    """Rows of each of two devices are followed by empty ones."""
    feed = Feed(make_mesh(tiny(mesh={"data": 2}).mesh, jax.devices()[:2]))
    rows = {
        name: 1 + np.arange(2 * n).reshape(2, *shape)
        for name, n, shape in (("advantages", 1, ()), ("tokens", 3, (3,)), ("routes", 12, (3, 2, 2)))
    }
    for name, x in feed.filled_up(rows, 6).items():
        assert x.shape == (6, *rows[name].shape[1:])
        np.testing.assert_array_equal(x[[0, 3]], rows[name])
        assert not x[[1, 2, 4, 5]].any()


def policy(cfg):
    """A clipped ratio of probabilities, as reinforcement learning has it: no sum over labels."""

    def objective(out, batch, total, hyper):
        labels, valid = map(out.sequence.own, targets(batch, cfg.data.seq_len, 0))
        h_nd = out.h_btd.reshape(-1, out.h_btd.shape[-1])
        logp = token_logprobs(h_nd, out.head_dv, labels.reshape(-1), cfg.train.loss_chunk).logp.reshape(
            labels.shape
        )
        ratio = jnp.exp(logp - jax.lax.stop_gradient(logp) + 0.1 * jnp.sin(jnp.arange(labels.shape[1])[None]))
        gain = jnp.minimum(ratio * batch["advantage"], jnp.clip(ratio, 0.95, 1.05) * batch["advantage"])
        loss = -(gain * valid).sum() / total.labels[0]
        return loss, {"loss": loss, "entropy": -(logp * valid).sum() / total.labels[0]}

    return objective


def test_another_objective():
    """Its gradient reaches the optimizer, its metrics come out, in two micro-batches as in one function."""
    cfg = tiny(
        model={"num_nextn_predict_layers": 0},
        optimizer=FLOAT32_MOMENTS | {"clip_norm": 1e9},
        train={"grad_accumulation": 2},
    )
    advantage = np.random.default_rng(3).standard_normal((4, 1)).astype(np.float32)
    batch, mesh, first = (
        masked(cfg) | {"advantage": advantage},
        make_mesh(cfg.mesh, jax.devices()[:1]),
        fresh_state(cfg),
    )

    def whole(params):
        total = totals(cfg, batch, 4)
        value = value_of(cfg, single_device(), policy(cfg))
        return value(params, batch, first.balance_bias, total, HYPER)

    want, parts = jax.jit(jax.grad(whole, has_aux=True))(first.params)
    state, metrics = make_train_step(cfg, mesh, policy(cfg))(first, batch, HYPER)
    assert set(metrics.scalars) == {"loss", "entropy", "grad_norm"} and metrics.finite
    for name, x in parts.metrics.items():
        np.testing.assert_allclose(metrics.scalars[name], x, rtol=REORDERED)
    for x, y in zip(jax.tree.leaves(state.opt_state.mu), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(10 * x - y) <= REORDERED * np.linalg.norm(y)  # 1 - beta_1 = 0.1


def test_another_computation_of_gradients():
    """It gets the layout of the mesh and the objective, and what it returns is what the step takes."""
    cfg, given = tiny(), []
    mesh = make_mesh(cfg.mesh, jax.devices()[:2])

    def zero(cfg, layout, objective):
        given.append((layout, objective))
        of = by_micro_batches(cfg, layout, objective)
        return lambda *args: jax.tree.map(jnp.zeros_like, of(*args))

    objective = pretraining(cfg)
    step = make_train_step(cfg, mesh, objective, zero)
    assert given == [(layout_over(cfg, mesh), objective)]
    state = jax.device_put(fresh_state(cfg), replicated(mesh))
    _, metrics = step(state, jax.device_put({"tokens": tokens(cfg)}, batch_sharding(mesh)), HYPER)
    assert metrics.grad_norm == 0.0 and not np.asarray(metrics.counts_le).any()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"token": np.zeros((2, 5), np.int32)}, r'a batch has "tokens" \[b, 5\]; this one has \[\'token\'\]'),
        (
            {"tokens": np.zeros((2, 4), np.int32)},
            r"shape \[2, 4\]: a window of data.seq_len=4 tokens needs 5",
        ),
        (
            {"loss_mask": np.ones((2, 4), bool)},
            r"batch\['loss_mask'\] is bool\[2, 4\]; it should be bool\[2, 5\]",
        ),
        (
            {"padding": np.ones((2, 5), np.int32)},
            r"batch\['padding'\] is int32\[2, 5\]; it should be bool\[2, 5\]",
        ),
        ({"lossmask": np.ones((2, 5), bool)}, r"no 'lossmask'; did you mean 'loss_mask'\?"),
    ],
)
def test_a_batch_that_does_not_fit(batch, message):
    """Windows of t tokens would wrap around: their last label would be their first token."""
    if "token" not in batch:
        batch = {"tokens": np.zeros((2, 5), np.int32)} | batch
    with pytest.raises(ValueError, match=message):
        check(batch, 4)

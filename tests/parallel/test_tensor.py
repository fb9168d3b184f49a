"""Tensor and sequence parallel attention on eight devices: the run of one device."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import batch_sharding, make_mesh
from deepseek_jax.training.sharding import state_shardings
from deepseek_jax.training.step import make_train_step
from tests.parallel.test_experts_mesh import BOUND, UNOPTIMISED, difference
from tests.parallel.test_experts_step import HYPER, distance
from tests.tiny_run import fresh_state, tiny, tokens

AXES = ("data", "node", "local", "tensor")
SINGLE = (1, 1, 1, 1)
HEADS = {"num_attention_heads": 4, "initializer_range": 0.2, "num_hidden_layers": 1}
MODELS = {
    "dense and MTP": HEADS | {"first_k_dense_replace": 1},  # the MTP module's block is a MoE layer
    "MoE": HEADS | {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
}
LAYOUTS = {  # experts in one hop over tensor; over node, then local x tensor
    "dense and MTP": ((2, 1, 1, 4), {"zero": True}),
    "MoE": ((1, 2, 2, 2), {"overlap": True}),
}


def config(model, shape=SINGLE, **mesh):
    return tiny(
        model=model,
        data={"seq_len": 8},
        train={"batch_size": 8},
        optimizer={"moment_dtype": "float32"},  # the first moment shows the gradient itself
        mesh=dict(zip(AXES, shape, strict=True)) | mesh,
    )


def mesh_of(cfg):
    m = cfg.mesh
    return make_mesh(m, jax.devices()[: m.data * m.node * m.local * m.tensor])


def packed(cfg, seed=0):
    """A batch whose sequences end at different places, also on the border of two devices' parts."""
    ids = tokens(cfg, seed)
    cut = np.array([3, 4, 1, 8, 2, 6, 7, 5])[:, None]
    at = np.arange(ids.shape[1])[None]
    return {
        "tokens": ids,
        "segments": (at >= cut).astype(np.int32),
        "positions": np.where(at >= cut, at - cut, at).astype(np.int32),
    }


@functools.cache
def program(name, single):
    """(config, mesh, lowered, compiled step) of the model and layout of that name, or of one device."""
    shape, mesh = (SINGLE, {}) if single else LAYOUTS[name]
    cfg = config(MODELS[name], shape, **mesh)
    mesh = mesh_of(cfg)
    lowered = make_train_step(cfg, mesh).lower(put(cfg, mesh, 0.0), batch_on(cfg, mesh, 0), HYPER)
    return cfg, mesh, lowered, lowered.compile(UNOPTIMISED)


def put(cfg, mesh, nudge):
    """The first state on its mesh; `nudge` shifts every weight."""
    state = jax.device_get(fresh_state(cfg))  # from the host, nothing is compiled to divide it
    if nudge:
        rng = np.random.default_rng(7)
        params = jax.tree.map(
            lambda x: x * (1 + np.float32(nudge) * rng.choice(np.float32([-1, 1]), x.shape)), state.params
        )
        state = state.replace(params=params)
    return jax.device_put(state, state_shardings(cfg, mesh))


def batch_on(cfg, mesh, seed):
    return jax.device_put(packed(cfg, seed), batch_sharding(mesh))


STEPS = 8


@functools.cache
def run(name, single, nudge=0.0):
    """(states after the first and the last step, metrics of each step) of a run on other tokens in each step."""
    cfg, mesh, _, step = program(name, single)
    state, history, first = put(cfg, mesh, nudge), [], None
    for i in range(STEPS):
        state, metrics = step(state, batch_on(cfg, mesh, i), HYPER)
        history.append(jax.device_get(metrics))
        first = jax.device_get(state) if first is None else first
    return first, jax.device_get(state), history


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_every_gradient_equal_one_device(name):
    """Of packed sequences. Relative, by the norm of each tensor; bound: see `test_experts_mesh`."""
    (state, _, (metrics, *_)), (state_1, _, (metrics_1, *_)) = run(name, False), run(name, True)
    for what in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        assert difference(getattr(metrics, what), getattr(metrics_1, what)) < BOUND, what
    np.testing.assert_array_equal(metrics.counts_le, metrics_1.counts_le)
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state.mu)
    for (path, x), y in zip(moments, jax.tree.leaves(state_1.opt_state.mu), strict=True):
        assert difference(x, y) < BOUND, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_some_steps_track_one_device(name):
    """Weights end nearer to one device's than those of one device that starts BOUND off: AdamW divides by the
    gradient's size, so what rounding does to small gradients grows, and such a run says by how much."""
    (_, state, history), (_, one, history_1), (_, near, _) = (
        run(name, False),
        run(name, True),
        run(name, True, BOUND),
    )
    for step, (got, want) in enumerate(zip(history, history_1, strict=True)):
        assert difference(got.loss, want.loss) < BOUND, step
        np.testing.assert_array_equal(got.counts_le, want.counts_le, err_msg=str(step))
    np.testing.assert_array_equal(state.balance_bias, one.balance_bias)
    assert np.abs(one.balance_bias).max() > 2 * HYPER.gamma
    assert distance(state, one) < distance(near, one) < 1e-3

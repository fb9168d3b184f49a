"""Training with experts spread over eight devices: the run of one device.

The model's groups (4) are the nodes of one mesh, halves, parts or none of those of the others.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import batch_sharding, make_mesh
from deepseek_jax.training.state import Hyper, state_shardings
from deepseek_jax.training.step import init_state, make_eval_step, make_train_step
from tests.parallel.comparison import BOUND, assert_same_step, assert_tracks, difference
from tests.tiny_run import fresh_state, tiny, tokens

HYPER = Hyper(np.float32(3e-3), np.float32(0.01), np.float32(0.3))
SHALLOW = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.2,
}
SINGLE = (1, 1, 1)
MESHES = [(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8), (2, 2, 2)]  # data, node, local


def config(shape=SINGLE, **mesh):
    data, node, local = shape
    return tiny(
        model=SHALLOW,
        data={"seq_len": 8},
        train={"batch_size": 8},
        optimizer={"moment_dtype": "float32"},  # the first moment shows the gradient itself
        mesh={"data": data, "node": node, "local": local} | mesh,
    )


def mesh_of(cfg):
    return make_mesh(cfg.mesh, jax.devices()[: cfg.mesh.data * cfg.mesh.node * cfg.mesh.local])


@functools.cache
def program(shape):
    cfg = config(shape)
    mesh = mesh_of(cfg)
    shardings = state_shardings(cfg, mesh)
    step = make_train_step(cfg, mesh)

    def run(state, seed=0):
        batch = jax.device_put({"tokens": tokens(cfg, seed)}, batch_sharding(mesh))
        return step(jax.device_put(state, shardings), batch, HYPER)

    return run


@functools.cache
def run(shape, steps, nudge=0.0):
    """(state, metrics of each step) of a run on other tokens in each step; `nudge` shifts the first weights."""
    state, history = fresh_state(config()), []
    rng = np.random.default_rng(7)

    def off(x):
        return x * (1 + np.float32(nudge) * rng.choice(np.float32([-1, 1]), x.shape))

    state = state.replace(params=jax.tree.map(off, state.params)) if nudge else state
    for step in range(steps):
        state, metrics = program(shape)(state, step)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_loss_and_every_gradient_equal_one_device(shape):
    (state, (metrics,)), (state_1, (metrics_1,)) = run(shape, 1), run(SINGLE, 1)
    assert_same_step(state, metrics, state_1, metrics_1)


STEPS = 20


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_twenty_steps_track_one_device(shape):
    assert_tracks(run(shape, STEPS), run(SINGLE, STEPS), run(SINGLE, STEPS, BOUND), bias=5 * HYPER.gamma)


# --- what lies where --------------------------------------------------------------------------------------------


def test_experts_and_their_moments_are_spread_the_rest_is_everywhere():
    cfg = config((2, 2, 2))
    shardings = state_shardings(cfg, mesh_of(cfg))
    state = jax.eval_shape(lambda: fresh_state(cfg))
    for (path, x), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True
    ):
        name = jax.tree_util.keystr(path)
        want = (x.shape[0], 2, *x.shape[2:]) if "experts" in name else x.shape
        assert sharding.shard_shape(x.shape) == want, name


def test_the_initial_state_does_not_depend_on_the_mesh():
    """Bits of the initialiser belong to the parameter, not to the device that holds them."""
    states = [init_state(cfg, mesh_of(cfg)) for cfg in (config(), config((1, 4, 2)))]
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(x, y)
    w = states[1].params["moe_layers"]["ffn"]["experts"]["w_up_edf"]
    assert {shard.data.shape[1] for shard in w.addressable_shards} == {1}


def evaluation(shape, precision):
    cfg = dataclasses.replace(config(shape, combine="same"), precision=precision)
    mesh = mesh_of(cfg)
    state = jax.device_put(fresh_state(cfg), state_shardings(cfg, mesh))
    batch = jax.device_put({"tokens": tokens(cfg)}, batch_sharding(mesh))
    args = state.params, state.balance_bias, batch
    return make_eval_step(cfg, mesh)(*args)


@pytest.mark.parametrize("precision", ["bf16", "deepseek_fp8"])
def test_evaluation_over_spread_experts(precision):
    """In FP8 too: tokens are dispatched in the format, power-of-two scales, that the experts quantise them to."""
    assert difference(evaluation((1, 4, 2), precision), evaluation(SINGLE, precision)) < BOUND


def test_experts_that_do_not_divide():
    cfg = config((1, 3, 1))
    with pytest.raises(
        ValueError,
        match=r"moe_layers.ffn.experts.w_down_efd \(1, 8, 16, 32\): 8 of 'expert' do not divide over 3 devices of "
        r"node=3; change config.mesh.node or the model",
    ):
        make_train_step(cfg, mesh_of(cfg))

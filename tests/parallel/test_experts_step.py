"""Training with experts spread over eight devices: the run of one device.

The model's groups (4) are the nodes of one mesh, halves, parts or none of those of the others.
"""

import chex
import jax
import numpy as np
import pytest

from deepseek_jax.balancing.plan import Plan
from deepseek_jax.training.passes import make_eval_step
from deepseek_jax.training.state import state_shardings
from deepseek_jax.training.step import init_state, make_train_step
from tests.parallel.comparison import BOUND, assert_same_step, assert_tracks, difference
from tests.parallel.harness import SINGLE, batch_on, config, mesh_of, put, run
from tests.tiny_run import HYPER, fresh_state

MESHES = [(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8), (2, 2, 2)]  # data, node, local


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_loss_and_every_gradient_equal_one_device(shape):
    assert_same_step(run(config(shape)), run(config()))


STEPS = 20


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_twenty_steps_track_one_device(shape):
    spread, one, near = run(config(shape), STEPS), run(config(), STEPS), run(config(), STEPS, BOUND)
    assert_tracks(spread, one, near, bias=5 * HYPER.gamma)


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
    chex.assert_trees_all_equal(*states)
    w = states[1].params["moe_layers"]["ffn"]["experts"]["w_up_edf"]
    assert {shard.data.shape[1] for shard in w.addressable_shards} == {1}


def evaluation(shape, precision, plan=None):
    cfg = config(shape, mesh={"combine": "same"}, precision=precision)
    state = put(cfg)
    return make_eval_step(cfg, mesh_of(cfg), plan)(state.params, state.balance_bias, batch_on(cfg))


PLAN = Plan(
    np.array([[7, 0, 0, 0, 5, 3, 1, 7, 4, 2, 6, 0, 3, 5, 1, 7]], np.int32)
)  # two slots each of eight devices


@pytest.mark.parametrize("precision, plan", [("bf16", None), ("deepseek_fp8", PLAN)])
def test_evaluation_over_spread_experts(precision, plan):
    """In FP8 too: tokens are dispatched in the format, power-of-two scales, that the experts quantise them to; and of experts with
    copies, one of which has both of its copies on one device."""
    assert difference(evaluation((1, 4, 2), precision, plan), evaluation(SINGLE, precision)) < BOUND


@pytest.mark.parametrize(
    "physical_lp, says",
    [
        ([[*range(8), 0]], "8 experts and redundant=1 more do not divide over 8 devices"),
        ([[0, *range(7), *range(8)]] * 2, "a plan of 2 layers for 1 MoE layers"),
        ([[*range(7)] * 2 + [0, 1]], "layer 0 has no slot for expert 7"),
    ],
)
def test_plans_that_are_none(physical_lp, says):
    """Before anything is traced: an expert without a slot would be another's."""
    cfg = config((1, 4, 2))
    with pytest.raises(ValueError, match=says):
        make_eval_step(cfg, mesh_of(cfg), Plan(np.array(physical_lp, np.int32)))


def test_experts_that_do_not_divide():
    cfg = config((1, 3, 1))
    with pytest.raises(
        ValueError,
        match=r"moe_layers.ffn.experts.w_down_efd \(1, 8, 16, 32\): 8 of 'expert' do not divide over 3 devices of "
        r"node=3; change config.mesh.node or the model",
    ):
        make_train_step(cfg, mesh_of(cfg))

"""ZeRO-1 on eight devices: the run of one device with its state divided, what travels, checkpoints to any layout."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.model.params import count
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.processes.together import whole_copy
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.ema import EMA, abstract_average
from deepseek_jax.training.state import state_shardings
from deepseek_jax.training.step import creation, init_state
from tests.parallel.comparison import BOUND, assert_restored, assert_same_step, assert_tracks
from tests.parallel.harness import config, mesh_of, program, put, run
from tests.tiny_run import HYPER, fresh_state

STEPS = 4
ONE = config()
LAYOUTS = {
    "data": config((8, 1, 1), mesh={"zero": True}),
    "all axes": config((2, 2, 2), mesh={"zero": True}),
    "accumulated": config((4, 1, 1), train={"grad_accumulation": 2}, mesh={"zero": True}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_run_is_that_of_one_device(name):
    """Only the order of sums differs."""
    divided, one, near = run(LAYOUTS[name], STEPS), run(ONE, STEPS), run(ONE, STEPS, BOUND)
    assert_same_step(divided, one)
    assert_tracks(divided, one, near, 2 * HYPER.gamma, ("loss", "balance_loss", "grad_norm"))


# --- what lies where --------------------------------------------------------------------------------------------


NORMS = 3 * 32 + 16 + 12  # floats in norm scales: two of the layer and the final one, those of both latents


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_device_holds_its_part(name):
    """Of master weights and both moments, after the last step too: 1/8, 1/8 and 1/4 of all but the norms."""
    mesh, state = mesh_of(LAYOUTS[name]), run(LAYOUTS[name], STEPS).last
    for tree in (state.params, state.opt_state.mu, state.opt_state.nu):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            parts = 1 if "norm" in jax.tree_util.keystr(path) else mesh.size
            held = {shard.device: shard.data.nbytes for shard in x.addressable_shards}
            assert held == dict.fromkeys(mesh.devices.flat, x.nbytes // parts), jax.tree_util.keystr(path)
        whole = sum(x.nbytes for x in jax.tree.leaves(tree))
        on_one = sum(x.addressable_shards[-1].data.nbytes for x in jax.tree.leaves(tree))
        assert on_one == (whole - 4 * NORMS) / mesh.size + 4 * NORMS


def test_the_first_state_is_born_divided():
    """Bits as on one device, and no device ever holds what others keep: it takes less memory than one whole copy
    of the parameters."""
    cfg = LAYOUTS["all axes"]
    created = creation(cfg, mesh_of(cfg)).lower().compile()
    chex.assert_trees_all_equal(created(), init_state(ONE, mesh_of(ONE)))
    memory = created.memory_analysis()
    whole = 4 * count(model_params(cfg.model))
    assert memory.output_size_in_bytes < 1.05 * 3 * whole / 8 + 3 * 4 * NORMS
    assert memory.temp_size_in_bytes < whole / 2


def _elements(shape):
    return math.prod(int(n) for n in re.findall(r"\d+", shape))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_travels(name):
    """One reduce-scatter and one all-gather per matrix and step, whatever the micro-batches; all-reduced are only
    norms, counts of experts and scalars, in the compiled program with the optimizer too."""
    cfg = LAYOUTS[name]
    lowered, compiled = (stage.as_text() for stage in program(cfg))
    shapes = jax.eval_shape(lambda: fresh_state(cfg)).params
    matrices = sum("norm" not in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes))
    assert len(re.findall(r'= "stablehlo.reduce_scatter"', lowered)) == matrices
    gathered = len(re.findall(r'= "stablehlo.all_gather"', lowered))
    assert gathered == matrices + (2 if name == "all axes" else 0)  # and the exchange's two of row counts
    lines = [line for line in compiled.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    reduced = [
        _elements(s) for line in lines for s in re.findall(r"\w\d+\[([\d,]*)\]", line.split(" all-reduce")[0])
    ]
    assert lines and max(reduced) == 32  # norm scales; the smallest matrix has 256
    assert len(re.findall(r" reduce-scatter\(", compiled)) == matrices
    assert len(re.findall(r" all-gather\(", compiled)) == gathered


# --- other layouts ------------------------------------------------------------------------------------------------

META = {"config": {}, "data": {}, "tokens": 0}
HOMES = LAYOUTS | {"one": ONE}


@pytest.mark.parametrize(("source", "targets"), [("all axes", ["one", "data"]), ("one", ["all axes"])])
def test_a_checkpoint_goes_from_any_layout_to_any(source, targets, tmp_path):
    """State and average, bit for bit; what has been divided by one rule is read by another."""
    cfg = HOMES[source]
    state = put(cfg)
    ema = EMA(state.params, 0.9)
    ema.update(state.params)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, ema.state(), META)
    checkpointer.wait()
    for target in targets:
        cfg = HOMES[target]
        blank = jax.device_put(
            jax.tree.map(jnp.zeros_like, fresh_state(cfg)), state_shardings(cfg, mesh_of(cfg))
        )
        restored = checkpointer.restore(blank, ema=abstract_average(blank.params))
        average = EMA(restored.ema["params"], 0.9, restored.ema["updates"])
        assert_restored(restored.state, state, blank)
        assert_restored(average.on_devices(blank.params), ema.value(), blank.params)
    checkpointer.close()


def test_a_whole_copy_for_completions():
    params = run(LAYOUTS["all axes"], STEPS).last.params
    copy = whole_copy(params, mesh_of(LAYOUTS["all axes"]))
    chex.assert_trees_all_equal(copy, params)
    assert {len(x.devices()) for x in jax.tree.leaves(copy)} == {1}

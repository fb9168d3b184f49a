"""ZeRO-1 on eight devices: the run of one device with its state divided, what travels, checkpoints to any layout."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.params import count
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.mesh import batch_sharding, make_mesh
from deepseek_jax.parallel.processes.together import whole_copy
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.ema import EMA, abstract_average
from deepseek_jax.training.state import state_shardings
from deepseek_jax.training.step import creation, init_state, make_train_step
from tests.parallel.comparison import BOUND, difference, distance
from tests.parallel.test_experts_step import HYPER, SHALLOW, SINGLE
from tests.tiny_run import fresh_state, tiny, tokens

STEPS = 4
LAYOUTS = {  # (data, node, local), micro-batches per device
    "data": ((8, 1, 1), 1),
    "all axes": ((2, 2, 2), 1),
    "accumulated": ((4, 1, 1), 2),
}


def config(shape=SINGLE, accumulation=1, *, zero, dtype="float32", **sections):
    data, node, local = shape
    return tiny(
        model=SHALLOW | {"dtype": dtype},
        data={"seq_len": 8},
        train={"batch_size": 8, "grad_accumulation": accumulation},
        optimizer={"moment_dtype": "float32"},  # the first moment shows the gradient itself
        mesh={"data": data, "node": node, "local": local, "zero": zero},
        **sections,
    )


def mesh_of(cfg):
    return make_mesh(cfg.mesh, jax.devices()[: cfg.mesh.data * cfg.mesh.node * cfg.mesh.local])


def put(cfg, mesh, nudge=0.0, seed=0):
    state = jax.device_get(fresh_state(cfg))  # from the host, nothing is compiled to divide it
    if nudge:
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda x: x * (1 + np.float32(nudge) * rng.choice(np.float32([-1, 1]), x.shape)), state.params
        )
        state = state.replace(params=params)
    return jax.device_put(state, state_shardings(cfg, mesh))


def batch_on(cfg, mesh, seed=0):
    return jax.device_put({"tokens": tokens(cfg, seed)}, batch_sharding(mesh))


@functools.cache
def program(name):
    """(config, mesh, lowered text, compiled step); `name` of LAYOUTS with ZeRO, None for one device without."""
    cfg = config(*LAYOUTS[name], zero=True) if name else config(zero=False)
    mesh = mesh_of(cfg)
    lowered = make_train_step(cfg, mesh).lower(put(cfg, mesh), batch_on(cfg, mesh), HYPER)
    return cfg, mesh, lowered.as_text(), lowered.compile()


@functools.cache
def run(name, nudge=0.0):
    """(states after the first and the last step, metrics of each step) of a run on other tokens in each step."""
    cfg, mesh, _, step = program(name)
    state, history, first = put(cfg, mesh, nudge), [], None
    for i in range(STEPS):
        state, metrics = step(state, batch_on(cfg, mesh, i), HYPER)
        history.append(jax.device_get(metrics))
        first = jax.device_get(state) if first is None else first
    return first, state, history


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_run_is_that_of_one_device(name):
    """Gradients to BOUND, by the norm of each tensor: only the order of sums differs. Weights after all steps lie
    nearer to one device's than those of one device that starts BOUND off: AdamW divides by the gradient's size."""
    (first, state, history), (first_1, one, history_1) = run(name), run(None)
    for step, (got, want) in enumerate(zip(history, history_1, strict=True)):
        for what in ("loss", "balance_loss", "grad_norm"):
            assert difference(getattr(got, what), getattr(want, what)) < BOUND, (step, what)
        np.testing.assert_array_equal(got.counts_le, want.counts_le, err_msg=str(step))
    np.testing.assert_array_equal(state.balance_bias, one.balance_bias)
    assert np.abs(one.balance_bias).max() > 2 * HYPER.gamma
    moments = jax.tree_util.tree_leaves_with_path(first.opt_state.mu)
    for (path, x), y in zip(moments, jax.tree.leaves(first_1.opt_state.mu), strict=True):
        assert difference(x, y) < BOUND, jax.tree_util.keystr(path)
    _, near, _ = run(None, BOUND)
    assert distance(jax.device_get(state), one) < distance(near, one) < 1e-3


# --- what lies where --------------------------------------------------------------------------------------------


NORMS = 3 * 32 + 16 + 12  # floats in norm scales: two of the layer and the final one, those of both latents


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_device_holds_its_part(name):
    """Of master weights and both moments, after the last step too: 1/8, 1/8 and 1/4 of all but the norms."""
    _, mesh, _, _ = program(name)
    _, state, _ = run(name)
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
    cfg, alone = config((2, 2, 2), zero=True), config(zero=False)
    created = creation(cfg, mesh_of(cfg)).lower().compile()
    for x, y in zip(*map(jax.tree.leaves, (created(), init_state(alone, mesh_of(alone)))), strict=True):
        np.testing.assert_array_equal(x, y)
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
    cfg, _, lowered, compiled = program(name)
    matrices = sum("norm" not in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes(cfg)))
    assert len(re.findall(r'= "stablehlo.reduce_scatter"', lowered)) == matrices
    gathered = len(re.findall(r'= "stablehlo.all_gather"', lowered))
    assert gathered == matrices + (2 if name == "all axes" else 0)  # and the exchange's two of row counts
    lines = [line for line in compiled.as_text().splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    reduced = [
        _elements(s) for line in lines for s in re.findall(r"\w\d+\[([\d,]*)\]", line.split(" all-reduce")[0])
    ]
    assert lines and max(reduced) == 32  # norm scales; the smallest matrix has 256
    assert len(re.findall(r" reduce-scatter\(", compiled.as_text())) == matrices
    assert len(re.findall(r" all-gather\(", compiled.as_text())) == gathered


def shapes(cfg):
    return jax.eval_shape(lambda: fresh_state(cfg)).params


# --- other layouts ------------------------------------------------------------------------------------------------

META = {"config": {}, "data": {}, "tokens": 0}
HOMES = {
    "one": config(zero=False),
    "data": config((8, 1, 1), zero=True),
    "all axes": config((2, 2, 2), zero=True),
}


@pytest.mark.parametrize(("source", "targets"), [("all axes", ["one", "data"]), ("one", ["all axes"])])
def test_a_checkpoint_goes_from_any_layout_to_any(source, targets, tmp_path):
    """State and average, bit for bit; what has been divided by one rule is read by another."""
    cfg = HOMES[source]
    state = put(cfg, mesh_of(cfg))
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
        for x, y, like in zip(*map(jax.tree.leaves, (restored.state, state, blank)), strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.sharding == like.sharding
        for x, y, like in zip(
            *map(jax.tree.leaves, (average.on_devices(blank.params), ema.value(), blank.params)), strict=True
        ):
            np.testing.assert_array_equal(x, y)
            assert x.sharding == like.sharding
    checkpointer.close()


def test_a_whole_copy_for_completions():
    _, mesh, _, _ = program("all axes")
    _, state, _ = run("all axes")
    for x, y in zip(*map(jax.tree.leaves, (whole_copy(state.params, mesh), state.params)), strict=True):
        assert len(x.devices()) == 1
        np.testing.assert_array_equal(x, y)

"""ZeRO-1 on eight devices: the run of one device, with its state divided; and what travels.

The rule's own mistakes, what each device holds, and checkpoints from and to any layout.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.model.params import Param, count
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.mesh import batch_sharding, make_mesh
from deepseek_jax.parallel.together import whole_copy
from deepseek_jax.parallel.zero import read_dtype, share_of
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.ema import EMA
from deepseek_jax.training.sharding import parameter_shares, state_shardings
from deepseek_jax.training.step import creation, init_state, losses, make_eval_step, make_train_step
from tests.parallel.test_experts_mesh import BOUND, UNOPTIMISED, difference
from tests.parallel.test_experts_step import HYPER, SHALLOW, SINGLE, distance
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
    return cfg, mesh, lowered.as_text(), lowered.compile(UNOPTIMISED)


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


# --- what is gathered is what the forward pass reads --------------------------------------------------------------


def evaluation(zero, dtype, precision):
    cfg = config((2, 1, 1), zero=zero, dtype=dtype, precision=precision)
    mesh = mesh_of(cfg)
    state = put(cfg, mesh)
    args = state.params, state.balance_bias, batch_on(cfg, mesh)
    lowered = make_eval_step(cfg, mesh).lower(*args)
    return jax.device_get(lowered.compile(UNOPTIMISED)(*args)), lowered.as_text()


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("bfloat16", "deepseek_fp8")])
def test_evaluation_is_bitwise_the_same(dtype, precision):
    """Weights cast before they are gathered are those cast where they are used; quantised from float32 all the same."""
    (got, text), (want, _) = (evaluation(zero, dtype, precision) for zero in (True, False))
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(got).all() and np.ptp(got) > 0
    gathered = re.findall(r'"stablehlo.all_gather".*\(tensor<\S+x(\w+)>\) ->', text)
    names = [
        p for p in jax.tree.leaves(model_params(config(zero=True).model), is_leaf=is_param) if not_norm(p)
    ]
    linear = sum(p.n_in is not None for p in names)
    half = linear + 2 if precision == "bf16" else 2  # embedding and head
    assert gathered.count("bf16") == half and gathered.count("f32") == len(names) - half


def is_param(x):
    return isinstance(x, Param)


def not_norm(p):
    return p.init == "normal"


def test_gradients_of_cast_weights():
    """Float32, and of weights in BF16 within the roundings of one more cast: 2^-8 of each element."""
    cfg = config(zero=False, dtype="bfloat16")
    declared, params = model_params(cfg.model), fresh_state(cfg).params
    cast = jax.tree.map(
        lambda p, w: w.astype(read_dtype(p, jnp.bfloat16, False)), declared, params, is_leaf=is_param
    )
    assert {x.dtype for x in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    batch, bias = {"tokens": tokens(cfg)}, np.zeros(cfg.model.balance_bias_shape, np.float32)

    @functools.partial(jax.jit, compiler_options=UNOPTIMISED)
    def both(params, cast):
        return [jax.value_and_grad(lambda p: losses(p, cfg, batch, bias, 8).main)(p) for p in (params, cast)]

    (loss, grads), (loss_cast, grads_cast) = both(params, cast)
    assert loss == loss_cast
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads_cast), strict=True
    ):
        assert difference(y, x) < 2**-8, jax.tree_util.keystr(path)


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
        average = EMA(blank.params, 0.9)
        restored = checkpointer.restore(blank, ema=average.abstract())
        average.restore(restored.ema)
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


# --- the rule -----------------------------------------------------------------------------------------------------

ROWS = {"expert": ("node", "local")}


def held(param, shape=(2, 2, 2)):
    return share_of("w", param, mesh_of(config(shape, zero=True)), ROWS, jnp.bfloat16).held


def test_the_first_dim_that_divides():
    every = ("data", "node", "local")
    assert held(Param((16, 24), ("embed", None))) == P(every)
    assert held(Param((3, 12, 16), ("layer", "embed", None))) == P(None, None, every)
    assert held(Param((8, 5, 7), ("layer", "embed", None))) == P(every)
    assert held(Param((3, 8, 6, 5), ("layer", "expert", "embed", None))) == P(
        None, ("node", "local"), ("data",)
    )
    assert held(Param((3, 16), ("layer", "embed"), "ones")) == P()
    assert held(Param((16, 24), ("embed", None)), SINGLE) == P()


def test_a_matrix_that_does_not_divide():
    with pytest.raises(
        ValueError, match=r"w \(12, 20\): no dim divides over the 8 devices of data=2 x node=2 x local=2"
    ):
        held(Param((12, 20), ("embed", None)))
    cfg = config((5, 1, 1), zero=True)
    with pytest.raises(
        ValueError,
        match=r"w_embed_vd \(384, 32\): no dim .* data=5; change config.mesh.data, or set .*zero=False",
    ):
        parameter_shares(cfg, mesh_of(cfg))

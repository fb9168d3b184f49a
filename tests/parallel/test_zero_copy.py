"""ZeRO-1: what is gathered is what the forward pass reads, to the bit; and the rule of what is divided."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.model.params import Param
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import quantise_weights
from deepseek_jax.parallel.zero import gather, held_specs, read_dtype, share_of
from deepseek_jax.precision import preset
from deepseek_jax.training.labels import totals
from deepseek_jax.training.passes import make_eval_step
from deepseek_jax.training.state import parameter_shares
from tests.parallel.comparison import difference
from tests.parallel.harness import SHALLOW, SINGLE, batch_on, config, mesh_of, put
from tests.tiny_run import fresh_state, losses, tokens


def evaluation(zero, dtype, precision):
    cfg = config((2, 1, 1), SHALLOW | {"dtype": dtype}, mesh={"zero": zero}, precision=precision)
    state = put(cfg)
    args = state.params, state.balance_bias, batch_on(cfg)
    lowered = make_eval_step(cfg, mesh_of(cfg)).lower(*args)
    return jax.device_get(lowered.compile()(*args)), lowered.as_text()


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("bfloat16", "deepseek_fp8")])
def test_evaluation_is_bitwise_the_same(dtype, precision):
    """Weights cast, or quantised, before they are gathered are those cast or quantised where they are used. In FP8 their
    bytes travel, once for both operands, and scales; in float32 the gate, which reads it."""
    (got, text), (want, _) = (evaluation(zero, dtype, precision) for zero in (True, False))
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(got).all() and np.ptp(got) > 0
    gathered = re.findall(r'"stablehlo.all_gather".*\(tensor<\S+x(\w+)>\) ->', text)
    names = [p for p in jax.tree.leaves(model_params(config().model), is_leaf=is_param) if not_norm(p)]
    linear = sum(p.n_in is not None for p in names)
    travel = [linear, "bf16"] if precision == "bf16" else [linear, "ui8"]
    assert len(names) == linear + 3  # embedding, head and gate
    scales = 3 if precision != "bf16" else 0  # of the experts, of which a device has some whole
    assert collections.Counter(gathered) == collections.Counter({travel[1]: travel[0], "f32": 1 + scales}) + (
        collections.Counter({"bf16": 2})
    )


def is_param(x):
    return isinstance(x, Param)


def not_norm(p):
    return p.init == "normal"


DIVIDED = {  # name -> parameter and, on eight devices, what its first dim that divides is
    "layers": Param((8, 20, 12), ("layer", "embed", None), n_in=1),
    "experts": Param((3, 8, 20, 12), ("layer", "expert", "embed", None), n_in=1),
    "inputs": Param(
        (2, 320, 300), ("layer", "embed", None), n_in=1
    ),  # 40 rows each: blocks lie on four devices
    "outputs": Param((2, 150, 1048), ("layer", "embed", None), n_in=1),  # 131 columns each
    "heads and values": Param((3, 3, 136, 130), ("layer", "heads", None, "embed"), n_in=2),  # rows with gaps
    "whole blocks": Param((3, 1024, 130), ("layer", "embed", None), n_in=1),
}


TWICE_DIVIDED = {  # by two replicas, and by a pipeline of four
    "rows and columns": Param((2, 150, 516), ("layer", "embed", None), n_in=1),  # 75 and 129 each
    "heads and values": Param((2, 6, 4, 129), ("layer", "heads", None, "embed"), n_in=2),
    "experts and rows": Param((2, 6, 20, 129), ("layer", "expert", "embed", None), n_in=1),
}
EIGHT = config((2, 2, 2), mesh={"zero": True})
PIPELINE = config((2,), mesh={"pipe": 4, "zero": True})


@pytest.mark.parametrize(
    ("policy", "cfg", "declared", "dims"),
    [
        ("deepseek_fp8_ue8m0", EIGHT, DIVIDED, [[0], [1], [1], [2], [2], [1]]),
        ("per_token_channel", EIGHT, DIVIDED, [[0], [1], [1], [2], [2], [1]]),
        ("per_tensor", EIGHT, DIVIDED, [[0], [1], [1], [2], [2], [1]]),
        ("deepseek_fp8", PIPELINE, TWICE_DIVIDED, [[1, 2], [1, 2], [1, 2]]),
        ("per_token_channel", PIPELINE, TWICE_DIVIDED, [[1, 2], [1, 2], [1, 2]]),
        ("per_tensor", PIPELINE, TWICE_DIVIDED, [[1, 2], [1, 2], [1, 2]]),
    ],
)
def test_parts_quantised_and_gathered_are_the_whole_quantised(policy, cfg, declared, dims):
    """To the bit, values and scales of both operands, whatever is divided; one device's part of a block may have its
    largest element, or another's."""
    mesh, policy = mesh_of(cfg), preset(policy)
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(p.shape, np.float32) for name, p in declared.items()}
    tree = {name: share_of(name, p, mesh, {}, jnp.float32) for name, p in declared.items()}
    assert [[dim for dim, _ in share.divided] for share in tree.values()] == dims
    local = functools.partial(gather, tree=tree, declared=declared, policy=policy, dtype=jnp.float32)
    spread = jax.shard_map(local, mesh=mesh, in_specs=(held_specs(tree),), out_specs=P(), check_vma=False)
    zeros, got = jax.jit(spread)(params)
    want = jax.jit(lambda w: quantise_weights(w, declared, policy))(params)
    for name, w in params.items():
        assert zeros[name].shape == w.shape and not zeros[name].any()
        for x, y in zip(*map(jax.tree.leaves, (got[name], want[name])), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32), err_msg=name)


def test_gradients_of_cast_weights():
    """Float32, and of weights in BF16 within the roundings of one more cast: 2^-8 of each element."""
    cfg = config(model=SHALLOW | {"dtype": "bfloat16"})
    declared, params = model_params(cfg.model), fresh_state(cfg).params
    cast = jax.tree.map(
        lambda p, w: w.astype(read_dtype(p, jnp.bfloat16, False)), declared, params, is_leaf=is_param
    )
    assert {x.dtype for x in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    batch, bias = {"tokens": tokens(cfg)}, np.zeros(cfg.model.balance_bias_shape, np.float32)

    total = totals(cfg, batch, 8)

    @jax.jit
    def both(params, cast):
        return [
            jax.value_and_grad(lambda p: losses(p, cfg, batch, bias, total)["loss"])(p)
            for p in (params, cast)
        ]

    (loss, grads), (loss_cast, grads_cast) = both(params, cast)
    assert loss == loss_cast
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads_cast), strict=True
    ):
        assert difference(y, x) < 2**-8, jax.tree_util.keystr(path)


# --- the rule -----------------------------------------------------------------------------------------------------

ROWS = {"expert": ("node", "local")}


def held(param, shape=(2, 2, 2)):
    return share_of("w", param, mesh_of(config(shape)), ROWS, jnp.bfloat16).held


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
    cfg = config((5, 1, 1), mesh={"zero": True})
    with pytest.raises(
        ValueError,
        match=r"w_embed_vd \(384, 32\): no dim .* data=5; change config.mesh.data, or set .*zero=False",
    ):
        parameter_shares(cfg, mesh_of(cfg))

"""ZeRO-1: what is gathered is what the forward pass reads, to the bit; and the rule of what is divided."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.model.params import Param
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.zero import read_dtype, share_of
from deepseek_jax.training.losses import losses
from deepseek_jax.training.sharding import parameter_shares
from deepseek_jax.training.step import make_eval_step
from tests.parallel.comparison import difference
from tests.parallel.test_experts_step import SINGLE
from tests.parallel.test_zero import batch_on, config, mesh_of, put
from tests.tiny_run import fresh_state, tokens


def evaluation(zero, dtype, precision):
    cfg = config((2, 1, 1), zero=zero, dtype=dtype, precision=precision)
    mesh = mesh_of(cfg)
    state = put(cfg, mesh)
    args = state.params, state.balance_bias, batch_on(cfg, mesh)
    lowered = make_eval_step(cfg, mesh).lower(*args)
    return jax.device_get(lowered.compile()(*args)), lowered.as_text()


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

    @jax.jit
    def both(params, cast):
        return [jax.value_and_grad(lambda p: losses(p, cfg, batch, bias, 8).main)(p) for p in (params, cast)]

    (loss, grads), (loss_cast, grads_cast) = both(params, cast)
    assert loss == loss_cast
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads_cast), strict=True
    ):
        assert difference(y, x) < 2**-8, jax.tree_util.keystr(path)


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

"""What `precision/sums.py` promises, read off the traced training step, and where BF16 sums would go wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.layers import embed
from deepseek_jax.model.loss import weighted_nll
from deepseek_jax.model.rows import sum_pairs
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import quantise_weights
from deepseek_jax.precision import preset
from deepseek_jax.training.labels import totals
from tests.programs import equations
from tests.tiny_run import fresh_state, gradients, tiny, tokens

SUMS = {"reduce_sum", "scatter-add", "cumsum", "reduce_window_sum", "psum", "reduce_scatter"}


@functools.cache
def traced(dtype, precision="bf16", read="float32", remat="none"):
    """Every equation of a device's gradients; `read`: dtype of the parameters that it reads (BF16 under ZeRO)."""
    cfg = tiny(model={"dtype": dtype}, precision=precision, train={"grad_accumulation": 2, "remat": remat})
    state = fresh_state(cfg)
    params = jax.tree.map(lambda x: x.astype(read), state.params)
    batch = {"tokens": tokens(cfg)}

    def run(params, bias):
        quantised = quantise_weights(params, model_params(cfg.model), preset(precision))
        total = totals(cfg, batch, 4)
        return gradients(params, quantised, cfg, batch, bias, total)

    return list(equations(jax.make_jaxpr(run)(params, state.balance_bias).jaxpr))


BF16 = [
    ("bfloat16",),
    ("bfloat16", "bf16", "bfloat16"),
    ("bfloat16", "bf16", "float32", "deepseek"),
    ("bfloat16", "deepseek_fp8"),
    ("bfloat16", "per_tensor"),
]


@pytest.mark.parametrize("program", BF16, ids="-".join)
def test_no_sum_is_narrower_than_float32(program):
    sums = [e for e in traced(*program) if e.primitive.name in SUMS]
    assert {e.primitive.name for e in sums} >= {"reduce_sum", "scatter-add", "cumsum"}
    for e in sums:
        x, y = e.invars[-1 if e.primitive.name == "scatter-add" else 0].aval, e.outvars[0].aval
        one_term = e.primitive.name == "reduce_sum" and x.size == y.size
        assert one_term or y.dtype not in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn), e


@pytest.mark.parametrize("program", [*BF16, ("float32",), ("float32", "deepseek_fp8")], ids="-".join)
def test_float32_products_are_not_rounded_to_tf32(program):
    """The gate of every model, everything in a float32 model. E4M3 operands would be exact in TF32 as well."""
    highest = (jax.lax.Precision.HIGHEST,) * 2
    products = [e for e in traced(*program) if e.primitive.name == "dot_general"]
    in_float32 = [e for e in products if e.invars[0].aval.dtype == jnp.float32]
    assert in_float32 and all(e.params["precision"] == highest for e in in_float32)
    assert len(in_float32) == len(products) or program[0] == "bfloat16"


def test_the_gates_precision_is_in_the_lowered_program():
    cfg = tiny(model={"dtype": "bfloat16"})
    batch, state = {"tokens": tokens(cfg)}, fresh_state(cfg)

    def run(params, bias):
        unquantised = quantise_weights(params, model_params(cfg.model), None)
        total = totals(cfg, batch, 4)
        return gradients(params, unquantised, cfg, batch, bias, total)

    lowered = jax.jit(run).trace(state.params, state.balance_bias).lower(lowering_platforms=("cuda",))
    dots = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    exact = [line for line in dots if "HIGHEST" in line]
    assert exact and len(exact) < len(dots)
    for line in dots:
        left = line.split(" : (")[1].split(",")[0]
        assert ("xf32>" in left) == ("HIGHEST" in line), line


@pytest.mark.parametrize("mean", [1.0, 0.0])
@pytest.mark.parametrize("read", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_a_frequent_id(mean, read):
    """4,096 occurrences of one id in a BF16 model; added up in BF16, a mean of 1 gives 520."""
    cfg = tiny(model={"dtype": "bfloat16"}).model
    ids = np.full((1, 4096), 7, np.int32)
    g = (mean + np.random.default_rng(0).standard_normal((1, 4096, cfg.hidden_size))).astype(jnp.bfloat16)
    w = jnp.zeros((cfg.vocab_size, cfg.hidden_size), read)
    _, vjp = jax.vjp(lambda w: embed({"w_embed_vd": w}, cfg, ids), w)
    (got,) = vjp(jnp.asarray(g))
    want = g.astype(np.float64)[0].sum(0)
    assert got.dtype == read and np.abs(np.asarray(got, np.float64)).sum(1).nonzero()[0].tolist() == [7]
    # Float32 sums of 4,096 terms of about 1: at most 4,096 roundings of 2^-24 of the largest partial sum; and one of
    # the result to the parameter's dtype.
    rounding = 2.0**-8 if read == jnp.bfloat16 else 0.0
    bound = 4096 * 2.0**-24 * np.abs(g.astype(np.float64)).sum(1).max() + rounding * np.abs(want)
    assert (np.abs(np.asarray(got[7], np.float64) - want) <= bound).all()


def test_a_tokens_sum_over_its_experts():
    """256 + 7 x 1 = 263, to be rounded once, to 264; in BF16, each 1 would vanish beside 256."""
    rows = jnp.asarray([[256.0]] + [[1.0]] * 7, jnp.bfloat16)
    assert sum_pairs(rows, jnp.arange(8, dtype=jnp.int32)[None]).tolist() == [[264.0]]


def test_a_loss_is_weighted_in_float32():
    """lambda = 0.3 in BF16 is 0.3008: the whole MTP gradient would be 0.26% too large, not just its roundings."""
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16)
    w = jnp.asarray(0.1 * rng.standard_normal((32, 50)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 50, 64), jnp.int32)

    def gradient(weight):
        return jax.grad(lambda h: weight * weighted_nll(h, w, labels, jnp.ones(64), 64))(h).astype(
            jnp.float32
        )

    ratio = float(jnp.vdot(gradient(0.3), gradient(1.0)) / jnp.vdot(gradient(1.0), gradient(1.0)))
    assert abs(ratio / 0.3 - 1) < 2**-10  # roundings of 2,048 elements, each within 2^-9, average out

"""Weights of one input joined, against the same weights apart: results and gradients, and which weights are joined."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.experts import expert_params, routed_experts
from deepseek_jax.model.ffn import mlp, mlp_params
from deepseek_jax.model.mla import down, mla_params
from deepseek_jax.model.params import initialise, tree_map
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import (
    JOINED,
    attach,
    join,
    join_for_inference,
    only_differentiated,
    quantise_weights,
)
from deepseek_jax.precision import PRESETS
from deepseek_jax.precision.beside import Joined
from deepseek_jax.training.labels import totals
from tests.programs import equations
from tests.tiny_run import fresh_state, gradients, tiny, tokens

CFG = tiny(
    model={"hidden_size": 72, "moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 40}
).model
M, F = 150, 256
RNG = np.random.default_rng(3)
FP8 = [name for name, policy in PRESETS.items() if policy is not None and policy.fprop[0].fine]
EPS = {"bfloat16": 2.0**-8, "float32": 2.0**-23}


def ffn(p, x):
    return mlp(p, x)


def experts(p, x):
    ids = jnp.asarray(RNG_IDS, jnp.int32)
    return routed_experts(p, x, ids, jnp.full(ids.shape, 0.5))


RNG_IDS = np.stack([RNG.permutation(CFG.n_routed_experts)[:2] for _ in range(M)])
LAYERS = {
    "ffn": (ffn, mlp_params(CFG.hidden_size, F)),
    "experts": (experts, expert_params(CFG)),
    "attention": (
        lambda p, x: jnp.concatenate(down(p, CFG, x[None]), -1),
        {name: p for name, p in mla_params(CFG).items() if "_a_" in name},
    ),
}


def results(name, policy, dtype, joining):
    """(joined names, y, gradients of x and of the parameters)"""
    fn, declared = LAYERS[name]
    params = initialise(jax.random.key(0), declared, 0.1)
    x, dy_like = jnp.asarray(RNG_X, dtype), jnp.asarray(RNG_X, dtype)

    @jax.jit
    def run(params, x):
        operands = quantise_weights(params, declared, policy)
        read = join(params, operands, declared, policy, dtype) if joining else (params, operands)
        y, vjp = jax.vjp(lambda params, x: fn(attach(params, read[1], policy), x), read[0], x)
        dy = jnp.resize(dy_like, y.shape).astype(y.dtype)
        return y, vjp(dy), read[1]

    y, (dp, dx), operands = run(params, x)
    return operands.keys() & JOINED.keys(), (y, dx, dp)


RNG_X = RNG.standard_normal((M, CFG.hidden_size)).astype(np.float32)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("preset", FP8)
def test_quantised_weights_joined_are_the_weights_apart_to_the_bit(name, preset):
    """But for sums: joined, the two terms of the gradient of the attention's input are added up before they are rounded; and a
    wider product may add up its float32 terms in another order."""
    policy = PRESETS[preset]
    none, (y, dx, dp) = results(name, policy, "bfloat16", joining=False)
    names, (y_joined, dx_joined, dp_joined) = results(name, policy, "bfloat16", joining=True)
    assert len(names) == 1 and not none
    np.testing.assert_array_equal(y_joined, y)
    if name != "attention":
        np.testing.assert_array_equal(dx_joined, dx)
    dx, dx_joined = np.float32(dx), np.float32(dx_joined)
    assert np.abs(dx_joined - dx).max() <= 2 * EPS["bfloat16"] * np.abs(dx).max()
    for got, want in zip(jax.tree.leaves(dp_joined), jax.tree.leaves(dp), strict=True):
        # M terms, each sum of which is rounded: of terms of random sign, the magnitude is sqrt(M) times the sum.
        assert np.linalg.norm(got - want) <= M * EPS["float32"] * M**0.5 * np.linalg.norm(want)


@pytest.mark.parametrize("name", LAYERS)
def test_bf16_weights_joined(name):
    """Products of the same numbers: only their float32 sums may come in another order."""
    _, apart = results(name, None, "bfloat16", joining=False)
    names, together = results(name, None, "bfloat16", joining=True)
    assert len(names) == 1

    def near(got, want):
        got, want = np.float32(got), np.float32(want)
        # Two roundings, as of the two terms of dx, and those of what they come from: SwiGLU's gradients.
        assert np.linalg.norm(got - want) <= 2 * EPS["bfloat16"] * np.linalg.norm(want)

    jax.tree.map(near, together, apart)


def test_what_is_not_joined():
    """Float32 models, scales that span the whole weight, and blocks of 128 that would reach from one weight into the next."""
    ragged = {"ffn": (ffn, mlp_params(CFG.hidden_size, 200)), "attention": LAYERS["attention"]}
    for policy, dtype, declared, joins in (
        (None, "float32", LAYERS["ffn"][1], False),
        (PRESETS["per_token_channel"], "bfloat16", LAYERS["ffn"][1], False),
        (PRESETS["deepseek_fp8"], "bfloat16", ragged["ffn"][1], False),
        (PRESETS["deepseek_fp8"], "bfloat16", ragged["attention"][1], True),  # 40 + 8 columns, but last
        (PRESETS["deepseek_fp8"], "float32", LAYERS["ffn"][1], True),
        (None, "bfloat16", ragged["ffn"][1], True),
    ):

        def read(params, declared=declared, policy=policy, dtype=dtype):
            return join(params, quantise_weights(params, declared, policy), declared, policy, dtype)

        params, operands = jax.eval_shape(
            read, jax.eval_shape(lambda d=declared: initialise(jax.random.key(0), d, 1.0))
        )
        assert bool(operands.keys() & JOINED.keys()) == joins
        assert params.keys() == declared.keys()


@pytest.mark.parametrize("precision", ["bf16", "deepseek_fp8"])
def test_no_weight_is_joined_within_a_micro_batch(precision):
    """The step joins each pair once; in the loop over micro-batches and layers no array as large as a weight is put together."""
    cfg = tiny(
        model={
            "dtype": "bfloat16",
            "moe_intermediate_size": 128,
            "intermediate_size": 128,
            "q_lora_rank": 128,
        },
        precision=precision,
        train={"grad_accumulation": 2},
    )
    state, declared, policy = fresh_state(cfg), model_params(cfg.model), PRESETS[precision]
    batch = {"tokens": tokens(cfg)}

    def run(params, bias):
        read = join(params, quantise_weights(params, declared, policy), declared, policy, cfg.model.dtype)
        return gradients(*read, cfg, batch, bias, totals(cfg, batch, 4))

    program = jax.make_jaxpr(run)(state.params, state.balance_bias).jaxpr
    wide = 2 * cfg.model.moe_intermediate_size
    outside = [e for e in program.eqns if e.primitive.name == "concatenate"]
    assert any(wide in e.outvars[0].aval.shape for e in outside)
    (loop,) = (e for e in program.eqns if e.primitive.name in ("while", "scan"))
    d = cfg.model.hidden_size
    for e in equations(loop.params["body_jaxpr" if loop.primitive.name == "while" else "jaxpr"].jaxpr):
        if e.primitive.name == "concatenate":
            assert not {wide, d} <= set(e.outvars[0].aval.shape), e


def test_for_inference():
    declared = LAYERS["experts"][1]
    params = initialise(jax.random.key(0), declared, 0.1)
    out = join_for_inference({"experts": params, "other": 1})
    assert out["experts"].keys() == {"w_gate_up_edf", "w_down_efd"} and out["other"] == 1
    assert isinstance(out["experts"]["w_gate_up_edf"], Joined)
    y, want = (functools.partial(experts, p)(jnp.asarray(RNG_X)) for p in (out["experts"], params))
    np.testing.assert_allclose(y, want, atol=300 * EPS["float32"] * float(jnp.abs(want).max()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("joining", [True, False])
def test_a_weight_gradient_adds_to_a_sum(name, joining):
    """Given sums of gradients for masters, the gradients are the sums with them: added up once, in float32."""
    (fn, declared), policy = LAYERS[name], PRESETS["deepseek_fp8"]
    params, sums = (initialise(jax.random.key(i), declared, 3.0) for i in range(2))
    x = jnp.asarray(RNG_X, "bfloat16")

    @functools.partial(jax.jit, static_argnames="adds")
    def gradients_of(params, adds):
        operands = quantise_weights(params, declared, policy)
        read = join(params, operands, declared, policy, "bfloat16") if joining else (params, operands)
        is_sum = only_differentiated(*read)
        given = jax.tree.map(lambda added, p, s: s if added and adds else p, is_sum, read[0], sums)
        y, vjp = jax.vjp(lambda p: fn(attach(p, read[1], policy, adds), x), given)
        return vjp(jnp.ones_like(y))[0]

    alone = gradients_of(params, adds=False)
    together = gradients_of(params, adds=True)

    def added(p, both, g, total):
        if p.n_in is None:
            np.testing.assert_array_equal(both, g)
        else:  # as above, of terms that may come in another order
            bound = M * EPS["float32"] * (M**0.5 * np.linalg.norm(g) + np.linalg.norm(total))
            assert np.linalg.norm(both - (g + total)) <= bound

    tree_map(added, declared, together, alone, sums)

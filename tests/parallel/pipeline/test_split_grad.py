"""A backward pass in two parts is the backward pass: its numbers, its work, and nothing kept that is at hand.

Dims: b sequence, t token, d hidden, n = b * t; 2 * 17 tokens, so that no activation has the size of a weight.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.attention import core_output
from deepseek_jax.model.block import block, block_params
from deepseek_jax.model.ffn import mlp
from deepseek_jax.model.layers import linear, rms_norm
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.loss import token_logprobs, weighted_nll
from deepseek_jax.model.mtp import mtp_module, mtp_params
from deepseek_jax.model.recompute import recompute
from deepseek_jax.model.transformer import context
from deepseek_jax.model.weights import attach, quantise_weights
from deepseek_jax.parallel.pipeline.cut import fewest_bytes
from deepseek_jax.parallel.pipeline.split_grad import split
from deepseek_jax.precision import preset
from tests.oracle.tiny import weights
from tests.parallel.comparison import BOUND, difference
from tests.programs import equations, flops
from tests.tiny_run import tiny

CFG = tiny().model
B, T, D = 2, 17, CFG.hidden_size


@functools.cache
def params():
    return weights(CFG, 0, bias=0.1)


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


# --- parts of the model: (fn(p, hand, x), p, hand, x) ---------------------------------------------------------------


def products():
    return lambda p, hand, x: linear(x, p["w"]), {"w": normal(D, 24)}, (), normal(B, T, D)


def norm():
    return lambda p, hand, x: rms_norm(x, p["scale"], 1e-6), {"scale": normal(D)}, (), normal(B, T, D)


def swiglu_ffn():
    p = jax.tree.map(lambda w: w[0], params()[0]["dense_layers"]["ffn"])
    return lambda p, hand, x: mlp(p, x), p, (), normal(B, T, D)


def attention():
    fn = lambda p, segments, qkv: core_output(qkv, segments, p)  # noqa: E731
    return (
        fn,
        normal(2, 8, D),
        np.int32(np.arange(T)[None] // np.array([[5], [9]])),
        tuple(normal(3, B, 2, T, 8)),
    )


def head(loss=weighted_nll, remat=jax.checkpoint):
    """With each token's weight or cotangent; `remat`: the gradients of a weighted sum are made in its forward pass."""

    def fn(p, hand, h_nd):
        labels_n, weights_n = hand
        return loss(h_nd, p, labels_n, *((weights_n,) if loss is weighted_nll else ()), 12)

    return (
        remat(fn),
        normal(D, 66),
        (np.int32(np.arange(B * T) % 66), np.ones(B * T, np.float32)),
        normal(B * T, D),
    )


def layer(kind, remat="none", precision="bf16"):
    """The blocks of a model and its MTP modules. Weights in FP8 as the training step attaches them."""
    trees, bias_le = params()
    declared = {"dense": block_params(CFG, False), "moe": block_params(CFG, True), "mtp": mtp_params(CFG)}[
        kind
    ]
    p = jax.tree.map(lambda w: w[0], trees["mtp" if kind == "mtp" else f"{kind}_layers"])
    policy, layout = preset(precision), single_device(remat)

    def fn(p, hand, x):
        quantised, bias_e, tokens_bt = hand
        ctx = context(CFG, Inputs(tokens_bt), layout)
        run = recompute(lambda p, x: one(attach(p, quantised, policy), x, bias_e, ctx), remat)
        y, stats = run(p, x["x"])
        return {"y": y, "stats": stats}

    def one(p, x, bias_e, ctx):
        if kind == "mtp":
            h_btd, out_btd, stats = mtp_module(p, CFG, *x, bias_e, ctx)
            return (h_btd, out_btd), stats
        y_btd, stats = block(p, CFG, x[0], bias_e if kind == "moe" else None, ctx)
        return y_btd, stats

    quantised = jax.eval_shape(lambda p: quantise_weights(p, declared, policy), p)
    hand = (quantised, bias_le[0], np.zeros((B, T), np.int32))
    x = {"x": tuple(normal(2, B, T, D)) if kind == "mtp" else (normal(B, T, D),), "count": np.int32(3)}
    return fn, p, hand, x


PARTS = {
    "linear": products,
    "norm": norm,
    "mlp": swiglu_ffn,
    "attention": attention,
    "head": head,
    "head, each token's own": lambda: head(lambda *x: token_logprobs(*x).logp, lambda fn: fn),
}
LAYERS = [
    ("dense", "none", "bf16"),
    ("dense", "full", "bf16"),
    ("dense", "deepseek", "deepseek_fp8"),
    ("moe", "none", "bf16"),
    ("moe", "full", "bf16"),
    ("moe", "full", "deepseek_fp8"),
    ("moe", "deepseek", "deepseek_fp8"),
    ("mtp", "deepseek", "deepseek_fp8"),
]
PARTS |= {", ".join(args): functools.partial(layer, *args) for args in LAYERS}


@functools.cache
def apart(name):
    return split(*PARTS[name]())


# --- the oracle -----------------------------------------------------------------------------------------------------


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def both_passes(fn, p, hand, x, g):
    """(out, gradients of the floats of x, of p), by `jax.vjp`."""
    leaves, tree = jax.tree.flatten((p, x))
    where = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

    def of_floats(*floats):
        filled = list(leaves)
        for i, leaf in zip(where, floats, strict=True):
            filled[i] = leaf
        p, x = tree.unflatten(filled)
        return [leaf for leaf in jax.tree.leaves(fn(p, hand, x)) if is_float(leaf)]

    out, vjp = jax.vjp(of_floats, *(leaves[i] for i in where))
    g = [leaf for leaf in jax.tree.leaves(g) if is_float(leaf)]
    grads = dict(zip(where, vjp(g), strict=True))
    dp, dx = tree.unflatten([grads.get(i) for i in range(len(leaves))])
    return out, dx, dp


def cotangent(fn, p, hand, x):
    shapes = jax.eval_shape(fn, p, hand, x)
    return jax.tree.map(lambda s: normal(*s.shape) if is_float(s) else np.zeros(s.shape, s.dtype), shapes)


def programs(name):
    """Jaxprs of the three parts, and of both passes by `jax.vjp`."""
    fn, p, hand, x = PARTS[name]()
    s, g = apart(name), cotangent(fn, p, hand, x)
    return (
        jax.make_jaxpr(s.forward)(p, hand, x),
        jax.make_jaxpr(s.backward)(p, hand, s.saved, g),
        jax.make_jaxpr(s.weights)(p, hand, s.cut),
        jax.make_jaxpr(functools.partial(both_passes, fn))(p, hand, x, g),
    )


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_no_product_is_done_twice_and_nothing_kept_that_is_at_hand(name):
    forward, backward, weights, whole = map(flops, programs(name))
    assert forward + backward + weights == pytest.approx(whole, abs=0.02 * (whole - forward))
    matrices = {w.size for w in jax.tree.leaves(PARTS[name]()[1]) if w.ndim > 1}
    assert not matrices & {a.size for a in apart(name).saved}


def count(jaxpr):
    return sum(e.primitive.name == "dot_general" for e in equations(jaxpr))


@pytest.mark.parametrize(
    ("name", "forward", "backward", "weights"),
    [
        ("linear", 1, 1, 1),
        ("mlp", 3, 3, 3),
        ("attention", 3, 6, 1),  # one chunk: 2 forward and 5 backward, and the output projection
        ("head", 1, 3, 0),  # a scan, whose gradients stay together
        ("dense, none, bf16", 10, 13, 8),
        ("dense, full, bf16", 10, 22, 8),  # all again but the last product, of which only the sum is left
    ],
)
def test_weight_gradients_are_left_for_later(name, forward, backward, weights):
    """Products: a linear layer has one in each part."""
    assert tuple(map(count, programs(name)[:3])) == (forward, backward, weights)


def test_fewest_bytes():
    """a -> b -> c, and b -> d: one value, the smaller one, and the earlier of two alike."""
    light = [("a", "b"), ("b", "c"), ("b", "d")]
    sizes = {"a": 4, "b": 2, "c": 2, "d": 3}
    assert fewest_bytes(sizes, light, "a", "cd") == ["b"]
    assert fewest_bytes(sizes, light, "a", "c") == ["b"]
    assert fewest_bytes(sizes, light, "a", "d") == ["b"]
    assert fewest_bytes(sizes | {"c": 1}, light, "a", "c") == ["c"]
    assert fewest_bytes({v: 2**33 * n for v, n in sizes.items()}, light, "a", "cd") == ["b"]
    assert fewest_bytes({"a": 4, "b": 9, "c": 1}, [*light, ("bc", "e")], "ac", "e") == ["a", "c"]
    assert fewest_bytes(sizes, light, "a", "") == []


def numbers(name):
    """Results and gradients, (of the parts, of `jax.vjp`); weights in FP8 as they are quantised there."""
    fn, p, hand, x = PARTS[name]()
    declared = {"dense": block_params(CFG, False), "moe": block_params(CFG, True), "mtp": mtp_params(CFG)}
    kind, *_, precision = name.split(", ")[0], *name.split(", ")

    def run(p, hand, x, g):
        if kind in declared:
            hand = (quantise_weights(p, declared[kind], preset(precision)), *hand[1:])
        s = split(fn, p, hand, x)
        out, saved = s.forward(p, hand, x)
        dx, cut = s.backward(p, hand, saved, g)
        out = [leaf for leaf in jax.tree.leaves(out) if is_float(leaf)]
        return (out, dx, s.weights(p, hand, cut)), both_passes(fn, p, hand, x, g)

    hand = (None, *hand[1:]) if kind in declared else hand
    return jax.jit(run)(p, hand, x, cotangent(*PARTS[name]()))


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "head",
        "dense, none, bf16",
        "moe, full, bf16",
        "mtp, deepseek, deepseek_fp8",
    ],
)
def test_results_and_gradients_are_those_of_the_backward_pass_as_one(name):
    got, want = numbers(name)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert difference(a, b) < BOUND, jax.tree_util.keystr(path)

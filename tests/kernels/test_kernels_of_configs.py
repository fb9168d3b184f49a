"""Every linear layer of every config, and of every published config.json at hand, has kernels on a Hopper GPU.

Forward pass and both gradients are traced for all of them; one of each kind of tiling and padding is lowered for CUDA.
"""

import collections
import importlib
import json
import math
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.hf.config import from_hf
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.ffn import mlp
from deepseek_jax.model.layers import linear
from deepseek_jax.model.params import Param, tree_map_with_name
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import JOINED, attach, join, quantise_weights
from deepseek_jax.precision import preset
from deepseek_jax.precision.product import Quantised, quantise_weight
from pallas_kernels import dispatch
from pallas_kernels.blocks import BLOCK
from pallas_kernels.compat import JAX_VERSION
from pallas_kernels.fp8_gemm.shapes import tile_config
from pallas_kernels.fp8_grouped_gemm.shapes import gemm_config, wgrad_config
from pallas_kernels.quantize.ops import quantize
from tests.shipped import OF_RUNS

ROOT = pathlib.Path(__file__).parents[2]
TOKENS, EXPERTS, TOP_K = 4096, 8, 2
POLICY = preset("deepseek_fp8")
NAMES = ("w_gate_df", "w_up_df", "w_down_fd")
REQUANTIZES = JAX_VERSION >= (0, 11)  # jax 0.10 does not get that kernel


def models():
    for name in OF_RUNS:  # units serve V3 itself
        yield name, from_config_dict(importlib.import_module(f"configs.{name}").get_config()).model
    for file in sorted((ROOT / "tests" / "hf" / "configs").glob("*.json")):
        yield file.stem, from_hf(json.loads(file.read_text()))


def linears():
    """(of experts, input width, output width) -> a parameter that has it, or of dense ones that are joined the first. Experts'
    are joined where they are traced."""
    found = {}
    for model, cfg in models():
        widths = {}

        def one(name, p, widths=widths):
            if p.n_in is not None:
                shape = p.shape[sum(axis in ("layer", "expert") for axis in p.axes) :]
                sides = (math.prod(shape[: p.n_in]), math.prod(shape[p.n_in :]))
                widths[name] = ("expert" in p.axes, *sides)

        tree_map_with_name(one, model_params(cfg))
        for name, (of_experts, width_in, width_out) in widths.items():
            found.setdefault((of_experts, width_in, width_out), f"{model} {name}")
            for first, second in JOINED.values():
                other = widths.get(name.removesuffix(first) + second)
                if name.endswith(first) and not of_experts and other:
                    found.setdefault((of_experts, width_in, width_out + other[2]), f"{model} {name} joined")
    return found


LINEARS = linears()


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def weight(w, policy=POLICY):
    return w if policy is None else Quantised(w, *quantise_weight(jax.lax.stop_gradient(w), policy), policy)


def dense(width_in, width_out):
    """(x, w, dy) -> output and both gradients, and the arrays to give it."""

    def run(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: linear(x, weight(w)), x, w)
        return y, vjp(dy)

    return run, [
        array(TOKENS, width_in),
        array(width_in, width_out, dtype=jnp.float32),
        array(TOKENS, width_out),
    ]


def differentiated(call, names, weights, policy, *xs):
    """Output of call(products, *xs) and its gradients, as in a step: weights are made ready outside."""
    params = dict(zip(names, weights, strict=True))
    declared = {name: Param(w.shape, ("expert", None, None)[-w.ndim :], n_in=1) for name, w in params.items()}
    params, operands = join(params, quantise_weights(params, declared, policy), declared, policy, "bfloat16")
    return jax.vjp(lambda params, *xs: call(attach(params, operands, policy), *xs), params, *xs)


def ffn(d, f):
    def run(x, gate, up, down, dy):
        y, vjp = differentiated(mlp, NAMES, (gate, up, down), POLICY, x)
        return y, vjp(dy)

    weights = [array(*shape, dtype=jnp.float32) for shape in ((d, f), (d, f), (f, d))]
    return run, [array(TOKENS, d), *weights, array(TOKENS, d)]


def experts(d, f, policy=POLICY):
    names = ("w_gate_edf", "w_up_edf", "w_down_efd")

    def run(x, gains, ids, dy, *w):
        y, vjp = differentiated(
            lambda p, x, gains: routed_experts(p, x, ids, gains), names, w, policy, x, gains
        )
        return y, vjp(dy)

    weights = [array(EXPERTS, *shape, dtype=jnp.float32) for shape in ((d, f), (d, f), (f, d))]
    pairs = [array(TOKENS, TOP_K, dtype=kind) for kind in (jnp.float32, jnp.int32)]
    return run, [array(TOKENS, d), *pairs, array(TOKENS, d), *weights]


@pytest.fixture
def refused(monkeypatch):
    """Why ops had no kernel, of all that is traced; kernels themselves are not traced, which takes longer."""
    reasons = set()

    def noted(xla, message):
        if REQUANTIZES or "requantize_transposed" not in message:
            reasons.add(message)
        return xla

    portable = types.SimpleNamespace(platform_dependent=lambda *xs, cuda, default: default(*xs))
    monkeypatch.setattr(dispatch, "_noted", noted)
    monkeypatch.setattr(dispatch, "lax", portable)
    return reasons


def test_no_linear_falls_back(refused):
    """Experts have [d, f] and [f, d]: one of each pair is traced."""
    assert {(False, 7168, 2112), (False, 14336, 7168), (True, 1024, 320)} <= LINEARS.keys()
    for (of_experts, *widths), name in LINEARS.items():
        if not of_experts or widths[0] > widths[1]:
            call, arrays = (experts if of_experts else dense)(*widths)
            jax.eval_shape(call, *arrays)
            assert not refused, name


def test_a_refusal_is_seen(refused):
    jax.eval_shape(quantize, array(64, 128, dtype=jnp.float16))
    assert len(refused) == 1


def kinds(of_experts, width_in, width_out):
    """What decides how the three products are tiled and padded."""
    products = ((width_out, width_in), (width_in, width_out))
    if of_experts:
        tiles = [gemm_config(BLOCK, n) for n, _ in products]
        wgrad = wgrad_config(width_in, width_out)
    else:
        tiles = [tile_config(TOKENS, n, k) for n, k in products]
        wgrad = tile_config(width_in, width_out, TOKENS)
    ragged = {(n % tile.tile_n > 0, k % BLOCK > 0) for (n, k), tile in zip(products, tiles, strict=True)}
    return {*tiles, *ragged, ("wgrad", wgrad), width_in % wgrad.tile_m > 0}


def representatives(of_experts):
    """Linears that have all kinds among them, the widest first."""
    seen, kept = set(), []
    for experts_, *widths in sorted(LINEARS, key=lambda x: -x[1] * x[2]):
        new = kinds(experts_, *widths) - seen
        if experts_ == of_experts and widths[0] != widths[1] and new:
            seen |= new
            kept.append(tuple(widths))
    return kept


OPS = (
    r"quantize|swiglu_quantize|quantize_transposed|requantize_transposed|(?:fp8_)?(?:grouped_)?(?:gemm|wgrad)"
)


def kernels(run, arrays):
    """How often a program for CUDA calls each of the ops' kernels."""
    program = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    bodies = re.findall(rf"func private @(?:{OPS})(?:_\d+)?\(", program)
    assert program.count("mosaic_gpu_v2") == len(bodies) > 0
    return collections.Counter(re.findall(rf"call @({OPS})(?:_\d+)?\(", program))


def expected(**calls):
    return calls if REQUANTIZES else {op: n for op, n in calls.items() if op != "requantize_transposed"}


def test_every_kind_of_dense_linear_lowers_for_cuda():
    """Quantised are x, dy and w, and along the tokens x and dy."""
    chosen = representatives(False)
    assert any(width_out % BLOCK for _, width_out in chosen)
    calls = expected(quantize=3, quantize_transposed=1, requantize_transposed=1, fp8_gemm=3)
    for widths in chosen:
        assert kernels(*dense(*widths)) == calls, widths


def test_a_ragged_ffn_lowers_for_cuda():
    """V2-Lite's. Quantised are the weights, x, gate and up to keep, dy and the gradients of gate and up; along the tokens
    x, what SwiGLU gave, dy and those gradients."""
    assert (False, 2048, 10944) in LINEARS
    assert kernels(*ffn(2048, 10944)) == expected(
        quantize=9, swiglu_quantize=1, quantize_transposed=4, requantize_transposed=1, fp8_gemm=9
    )


def test_every_kind_of_expert_lowers_for_cuda():
    """As an FFN, but that dy, too, is requantised along the tokens. In BF16 there are products only. Gate and up are one
    product, in FP8 where the experts are whole blocks wide."""
    seen = set()
    for f, d in {tuple(sorted(widths)) for widths in representatives(True)}:
        whole = f % BLOCK == 0
        fp8 = expected(
            quantize=7 if whole else 9,
            swiglu_quantize=1,
            quantize_transposed=2 if whole else 3,
            requantize_transposed=2,
            fp8_grouped_gemm=4 if whole else 6,
            fp8_grouped_wgrad=2 if whole else 3,
        )
        assert kernels(*experts(d, f)) == fp8, (d, f)
        assert kernels(*experts(d, f, None)) == {"grouped_gemm": 4, "grouped_wgrad": 2}, (d, f)
        seen.add(whole)
    assert seen == {True, False}

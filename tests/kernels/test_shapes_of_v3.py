"""The named shapes are the products that DeepSeek-V3 runs: traced in training on 64 devices, several micro-batches a step, in
prefill and in decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs.v3_671b import get_config
from deepseek_jax.config import MeshConfig, from_config_dict
from deepseek_jax.model import decoding
from deepseek_jax.model.cache import empty_pages, paged_view
from deepseek_jax.model.params import abstract, tree_map
from deepseek_jax.model.platform import as_on_gpus
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import as_matrices, multiplied_as_stored
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.precision import preset
from deepseek_jax.training.passes import make_eval_step
from deepseek_jax.training.step import abstract_state, make_train_step
from pallas_kernels.blocks import cdiv
from pallas_kernels.fp8_gemm.shapes import DECODED, TOKENS
from pallas_kernels.testing.workloads import workloads
from tests.tiny_run import HYPER

WHOLE = from_config_dict(get_config())
# A dense layer and one with experts have all shapes; MTP modules have those of the latter.
MODEL = dataclasses.replace(
    WHOLE.model, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0
)
PAIRS = TOKENS * MODEL.num_experts_per_tok


def config(devices, precision):
    mesh = MeshConfig(node=devices // 8, local=8, zero=True, receive=WHOLE.mesh.receive)
    train = dataclasses.replace(WHOLE.train, batch_size=2 * devices, grad_accumulation=2)
    return dataclasses.replace(WHOLE, model=MODEL, mesh=mesh, train=train, precision=precision)


@pytest.fixture
def products(monkeypatch):
    """(op, M, N, K, recipe, whether it accumulates) of each product that is traced; of grouped ones (op, G, N, K, whether the
    weight is [N, K]), of weight gradients (op, G, M, N, whether it accumulates)."""
    found = set()

    def noted(op, implementation, *operands, mosaic, xla, **rest):
        if op.startswith("fp8"):
            (a, _, b, b_scale), groups = operands[:4], operands[4:5]
        else:
            (a, b), b_scale, groups = operands[:2], None, operands[2:3]
        if op == "fp8_gemm":
            recipe = "1d1d" if len(b_scale) == len(b) else "1d2d"
            found.add((op, len(a), len(b), a.shape[1], recipe, operands[4] is not None))
        elif op == "fp8_grouped_wgrad":
            found.add((op, len(groups[0]), len(a), len(b), operands[5] is not None))
        elif op == "grouped_wgrad":
            found.add((op, len(groups[0]), a.shape[1], b.shape[1], operands[3] is not None))
        else:
            as_it_is = op == "grouped_gemm" and not mosaic.keywords["transpose_b"]
            g, n, k = b.swapaxes(1, 2).shape if as_it_is else b.shape
            found.add((op, g, n, k, not as_it_is))
        return xla(*operands)

    for op in ("fp8_gemm", "fp8_grouped_gemm", "grouped_gemm"):
        monkeypatch.setattr(f"pallas_kernels.{op}.ops.dispatch", noted)
    return found


def trained(precision):
    cfg = config(64, precision)
    mesh = abstract_mesh(cfg.mesh, 64)
    batch = {"tokens": jax.ShapeDtypeStruct((2 * 64, TOKENS + 1), jnp.int32)}
    jax.eval_shape(make_train_step(cfg, mesh), abstract_state(cfg, mesh), batch, HYPER)


def prefilled(precision):
    cfg = config(32, precision)
    mesh = abstract_mesh(cfg.mesh, 32)
    state = abstract_state(cfg, mesh)
    batch = {"tokens": jax.ShapeDtypeStruct((32, TOKENS + 1), jnp.int32)}
    jax.eval_shape(make_eval_step(cfg, mesh), state.params, state.balance_bias, batch)


def stored(p, w):
    """A weight as an FP8 checkpoint has it."""
    if p.n_in is None:
        return jax.ShapeDtypeStruct(w.shape, jnp.bfloat16)
    *lead, k, n = jax.eval_shape(lambda w: as_matrices(p, w), w).shape
    scale = jax.ShapeDtypeStruct((*lead, cdiv(n, 128), cdiv(k, 128)), jnp.float32)
    return {"fp8": jax.ShapeDtypeStruct((*lead, n, k), jnp.float8_e4m3fn), "scale": scale}


def decoded(rows):
    """A step with the weights of an FP8 checkpoint."""
    declared = model_params(MODEL)

    def run(params, tokens):
        ready = decoding.prepare(multiplied_as_stored(params, declared, preset("deepseek_fp8")), MODEL)
        pages = empty_pages(MODEL, MODEL.num_hidden_layers, 4 * rows)
        table = jnp.arange(4 * rows, dtype=jnp.int32).reshape(rows, 4)
        view = paged_view(pages, table, jnp.full(rows, 200, jnp.int32), 1)
        return decoding.decode(ready, MODEL, tokens, view, None, decoding.ONE_DEVICE)[0]

    params = tree_map(stored, declared, abstract(declared))
    jax.eval_shape(run, params, jax.ShapeDtypeStruct((rows, 1), jnp.int32))


def named(op):
    """The shapes of an op as `products` notes them."""
    for w in workloads()[op]:
        s = w.shape
        if op == "fp8_gemm":
            yield op, s.m, s.n, s.k, s.recipe, s.accumulate
        elif s.kind == "wgrad":
            assert s.groups * s.k == PAIRS, s
            yield op.replace("gemm", "wgrad"), s.groups, s.m, s.n, s.accumulate
        elif s.kind == "contiguous":
            assert s.groups * s.m == PAIRS, s
            yield op, s.groups, s.n, s.k, w.options.get("transpose_b", True)


def of(found, op):
    return {product for product in found if product[0] in (op, op.replace("gemm", "wgrad"))}


def test_products_of_training_and_prefill(products):
    """With scales along both operands is what a weight gradient multiplies, and only that."""
    trained("deepseek_fp8")
    decodes = {shape for shape in named("fp8_gemm") if shape[1] in DECODED}
    assert of(products, "fp8_gemm") == set(named("fp8_gemm")) - decodes
    prefilled("deepseek_fp8")
    assert of(products, "fp8_grouped_gemm") == set(named("fp8_grouped_gemm"))


def test_experts_in_bf16(products):
    trained("bf16")
    prefilled("bf16")
    assert of(products, "grouped_gemm") == set(named("grouped_gemm"))


def test_products_of_decoding(products):
    """All in FP8, from the bytes of a checkpoint; experts have the widths of the masked shapes."""
    with as_on_gpus():
        for rows in DECODED:
            decoded(rows)
    assert of(products, "fp8_gemm") == {shape for shape in named("fp8_gemm") if shape[1] in DECODED}
    masked = {(w.shape.n, w.shape.k) for w in workloads()["fp8_grouped_gemm"] if w.shape.kind == "masked"}
    assert {product[2:4] for product in products - of(products, "fp8_gemm")} == masked

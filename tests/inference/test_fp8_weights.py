"""Generation and scoring from the FP8 weights of a checkpoint, against the same weights dequantised."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax import hf
from deepseek_jax.hf.names import leaves
from deepseek_jax.model import experts
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import multiplied_as_stored
from deepseek_jax.precision import PRESETS
from deepseek_jax.precision.product import product
from deepseek_jax.serving import one_device
from tests.inference.checkpoint import save_run
from tests.oracle.tiny import V3, weights

# Hidden size and heads of more than one block of 128, neither filled.
CFG = dataclasses.replace(
    V3,
    hidden_size=200,
    v_head_dim=50,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    initializer_range=0.08,
)
IDS = np.random.default_rng(5).integers(0, CFG.vocab_size, 40).tolist()
NEW = 10
FP8 = {path: leaf for path, leaf in leaves(CFG).items() if leaf.may_be_fp8}
# E4M3 rounds to one of 8 steps per power of two: an error of 1/16 at most, relative to at least 1, uniform. Its root mean
# square, over values spread evenly in the exponent, is 1/16 / sqrt(3) * sqrt(mean of 1/m^2) = 0.026 of the value, and so of
# a product's result, whose terms round independently.
ROUNDING = 1 / 16 / math.sqrt(3) * math.sqrt((1 - 1 / 4) / (2 * math.log(2)))
# Each of the five products of an attention and three of an FFN brings its own, in each layer, and SwiGLU steepens that of
# its gate: the slope of log silu(g) over log g is at most 1.28 where g > 0. What a layer adds to the residual stream is at
# most all of it.
BOUND = 1.28 * ROUNDING * math.sqrt(8 * CFG.num_hidden_layers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / "checkpoint"
    hf.save(path, CFG, *weights(CFG, seed=2), format="fp8")
    return path


@pytest.fixture(scope="module")
def models(folder):
    """(FP8 weights multiplied as they are, the same numbers in float32)"""
    kept = deepseek_jax.load(folder, dtype="float32", keep_fp8=True)
    return kept, deepseek_jax.load(folder, dtype="float32")


def of(tree, path):
    for name in path.split("."):
        tree = tree[name]
    return tree


def relative(got, want):
    return np.linalg.norm(np.float64(got) - want) / np.linalg.norm(np.float64(want))


def test_each_weight_is_the_parameter_dequantised(models):
    """Bit for bit, in the parameter's shape: no dim is transposed or split elsewhere."""
    kept, exact = models
    for path in FP8:
        got = product(of(kept.params, path)).array(jnp.float32)
        np.testing.assert_array_equal(got.reshape(of(exact.params, path).shape), of(exact.params, path))


def test_memory_is_a_byte_per_weight(models):
    """And four bytes for each block of 128 x 128; everything else is as in a model without FP8."""
    kept, exact = models
    for path, leaf in FP8.items():
        rows, columns = leaf.hf_shape
        blocks = math.prod(leaf.stack) * math.ceil(rows / 128) * math.ceil(columns / 128)
        nbytes = sum(x.nbytes for x in jax.tree.leaves(of(kept.params, path)))
        assert nbytes == of(exact.params, path).size + 4 * blocks
    assert "float8_e4m3fn" in repr(kept)


def test_logits_differ_by_the_rounding_of_activations(models):
    kept, exact = models
    error = relative(kept.logits(IDS), exact.logits(IDS))
    assert ROUNDING / 2 < error < BOUND
    score = np.float64(kept.logits(IDS))[:-1]
    score = score[np.arange(39), IDS[1:]] - np.log(np.exp(score).sum(-1))
    np.testing.assert_allclose(kept.score(IDS), score, atol=5e-5)


PROMPTS = [IDS[:5], IDS[7:19], IDS[30:31]]


def test_greedy_tokens(models):
    """Through the cache: under the dequantised weights each is the best, up to the error of the logits."""
    kept, exact = models
    rows, same = kept.generate(PROMPTS, NEW, stop_ids=()), 0
    for prompt, row in zip(PROMPTS, rows, strict=True):
        logits_tv = exact.logits([*prompt, *row])[len(prompt) - 1 : -1]
        chosen = logits_tv[np.arange(NEW), row]
        assert (logits_tv.max(-1) - chosen < 3 * BOUND * logits_tv.std(-1)).all()
        same += (logits_tv.argmax(-1) == row).sum()
    assert same > 0.7 * 3 * NEW


def test_decoding_reads_the_bytes_of_the_checkpoint(models):
    """No weight is copied or dequantised when decoding begins but the up-projections that it absorbs."""
    kept, _ = models
    ready = kept.ready()
    for name, layers in (("dense_layers", 1), ("moe_layers", 1)):
        for path in [path for path in FP8 if path.startswith(name) and "wkv_b" not in path]:
            whole = of(kept.params, path).fprop_operand.q
            for i in range(layers):
                part = of(ready[name][i], path.split(".", 1)[1]).fprop_operand.q
                assert part.dtype == jnp.float8_e4m3fn
                at = whole.unsafe_buffer_pointer() + i * part.nbytes
                assert part.unsafe_buffer_pointer() == at or at % 64


def test_layers_in_bfloat16_beside_layers_in_fp8():
    params = {"a": jnp.ones((2, 3, 4), jnp.bfloat16)}
    declared = {"a": model_params(CFG)["dense_layers"]["attn_norm_d"]}
    policy = PRESETS["deepseek_fp8"]
    assert multiplied_as_stored(params, declared, policy)["a"] is params["a"]


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_activations_have_scales_of_the_checkpoints_kind(scale, tmp_path):
    """NumPy multiplies the same FP8 numbers: only the order of float32 sums differs."""
    hf.save(tmp_path / "checkpoint", CFG, *weights(CFG, seed=2), format="fp8", scale=scale)
    kept = deepseek_jax.load(tmp_path / "checkpoint", dtype="float32", keep_fp8=True)
    w = jax.tree.map(lambda x: x[0], of(kept.params, "moe_layers.attn.wkv_a_dc"))
    x = np.random.default_rng(1).standard_normal((3, CFG.hidden_size)).astype(np.float32)
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 128))).reshape(3, -1, 128)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(448)
    if scale == "ue8m0":
        scales = np.exp2(np.ceil(np.log2(scales)))
    rounded = (blocks / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales
    want = rounded.reshape(3, -1)[:, : x.shape[1]] @ np.float64(w.array(jnp.float32))
    got = w.fprop(w.operand(jnp.asarray(x)), jnp.float32)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_generation_over_a_mesh(folder, models, monkeypatch):
    """Each device reads its experts' bytes; tokens travel in FP8 as they are multiplied. Results come back in BF16, whose sums
    are rounded inside and between nodes, by 2^-9 / sqrt(3) on average, in each layer: log-probabilities differ by three
    times that, of logits of a spread below 1.5. One device quantises likewise where it sorts rows, as on a GPU."""
    for most in ("FEW_ROWS", "APART_ROWS"):
        monkeypatch.setattr(experts, most, 0)
    for program in (one_device._decode, one_device._prefill):
        program.clear_cache()
    mesh = deepseek_jax.MeshConfig(data=1, node=2, local=2)
    over = deepseek_jax.load(folder, dtype="float32", keep_fp8=True, mesh=mesh)
    q = of(over.params, "moe_layers.ffn.experts.w_up_edf").fprop_operand.q
    assert {shard.data.shape[1] for shard in q.addressable_shards} == {CFG.n_routed_experts // 4}
    got, want = (m.generate(PROMPTS, NEW, stop_ids=(), logprobs=True) for m in (over, models[0]))
    for program in (one_device._decode, one_device._prefill):
        program.clear_cache()
    atol = 3 * 1.5 * 1.28 * 2**-9 * math.sqrt(2 / 3 * CFG.num_hidden_layers)
    for x, y in zip(got, want, strict=True):
        assert x.tokens == y.tokens
        np.testing.assert_allclose(x.logprobs, y.logprobs, rtol=0, atol=atol)


def test_what_does_not_go_with_fp8_weights(folder, tmp_path):
    with pytest.raises(ValueError, match=r"keep_fp8 has shardings of its own"):
        deepseek_jax.load(folder, keep_fp8=True, shardings={})
    with pytest.raises(ValueError, match=r"is a training run, whose weights are not in FP8"):
        deepseek_jax.load(save_run(tmp_path / "run"), keep_fp8=True)

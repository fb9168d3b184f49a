"""The whole model against the oracle: logits, MTP, loads, losses, gradients; and what depth may not change."""

import collections
import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import REMAT
from deepseek_jax.hf.names import get, leaves
from deepseek_jax.model.block import UNROLL_LAYERS, block, block_params
from deepseek_jax.model.layers import rms_norm
from deepseek_jax.model.layout import Context, Inputs, single_device
from deepseek_jax.model.modules import MLA, DeepSeekMoE, DeepSeekV3
from deepseek_jax.model.mtp import mtp_hidden
from deepseek_jax.model.params import abstract
from deepseek_jax.model.recompute import recompute
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.transformer import context, embedded, final_norm, forward, layers, model_params
from tests.oracle import model as oracle
from tests.oracle.tiny import V2, V3, checkpoint, rel, weights

TOKENS = np.random.default_rng(1).integers(0, V3.vocab_size, (2, 9)).astype(np.int32)
# float32 against float64: rounding of about 1e-7 per operation through some 40 of them, in the same routing.
CLOSE = 1e-5


@pytest.fixture(scope="module", params=[V3, V2], ids=["v3", "v2"])
def case(request):
    """(cfg, params, bias, logits, aux, what the oracle says)"""
    cfg = request.param
    params, bias = weights(cfg)
    logits, aux = jax.jit(DeepSeekV3(cfg).apply)({"params": params}, TOKENS, balance_bias=bias)
    return cfg, params, bias, logits, aux, oracle.forward(*checkpoint(cfg, params, bias), TOKENS)


def test_logits(case):
    _, _, _, logits, _, want = case
    assert logits.dtype == jnp.float32
    assert rel(logits, want.logits) < CLOSE


def test_mtp_logits(case):
    cfg, _, _, _, aux, want = case
    if not cfg.num_nextn_predict_layers:
        assert aux.mtp is None
        return
    for k, logits in enumerate(want.mtp):
        assert rel(aux.mtp[k][:, : -(k + 1)], logits[:, : -(k + 1)]) < CLOSE


def test_mtp_joins_embedding_first_and_starts_after_the_final_norm(case):
    """The two other conventions give other logits, so the comparison above can tell them apart."""
    cfg, params, bias, *_, want = case
    if not cfg.num_nextn_predict_layers:
        pytest.skip("no MTP")
    tensors, config = checkpoint(cfg, params, bias)
    name = f"model.layers.{cfg.num_hidden_layers}.eh_proj.weight"
    swapped = tensors | {name: np.concatenate(np.split(tensors[name], 2, axis=1)[::-1], axis=1)}
    assert rel(oracle.forward(swapped, config, TOKENS).mtp[0], want.mtp[0]) > 0.1
    # Before the norm: fold the final norm's weight into nothing by setting it to one in the MTP path only.
    plain = tensors | {"model.norm.weight": np.ones_like(tensors["model.norm.weight"])}
    assert rel(oracle.forward(plain, config, TOKENS).mtp[0], want.mtp[0]) > 0.05


def test_loads(case):
    cfg, *_, aux, want = case
    n = cfg.num_moe_layers  # the oracle leaves out the MTP positions past the end
    assert aux.expert_counts_le.shape == cfg.balance_bias_shape and aux.expert_counts_le.dtype == jnp.int32
    np.testing.assert_array_equal(aux.expert_counts_le[:n], want.counts[:n])


def test_sequence_loss(case):
    cfg, *_, aux, want = case
    if cfg.num_nextn_predict_layers:
        pytest.skip("the wrapped MTP positions count here, not in the oracle")
    assert abs(float(aux.seq_loss) - want.seq_loss) < 1e-5 * want.seq_loss


def test_positions_and_segments():
    """Two documents packed into one window give what each gives alone."""
    cfg = dataclasses.replace(V3, num_nextn_predict_layers=0)
    params, bias = weights(cfg)
    segments = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]] * 2, np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2, np.int32)
    got, _ = jax.jit(lambda p: forward(p, cfg, Inputs(TOKENS, positions, segments), bias, single_device()))(
        params
    )
    tensors, config = checkpoint(cfg, params, bias)
    first = oracle.forward(tensors, config, TOKENS[:, :4]).hidden
    second = oracle.forward(tensors, config, TOKENS[:, 4:]).hidden
    assert rel(got, np.concatenate([first, second], axis=1)) < CLOSE


# --- gradients --------------------------------------------------------------------------------------------


def _labels(cfg):
    return np.random.default_rng(2).integers(0, cfg.vocab_size, TOKENS.shape)


def _jax_loss(cfg, bias, remat="none"):
    labels = _labels(cfg)

    def loss(params):
        logits, aux = DeepSeekV3(cfg, remat).apply({"params": params}, TOKENS, balance_bias=bias)

        def nll(x, y):
            return -jnp.take_along_axis(jax.nn.log_softmax(x), y[..., None], -1).mean()

        total = nll(logits, labels)
        for k in range(cfg.num_nextn_predict_layers):
            total += 0.3 * nll(aux.mtp[k][:, : -(k + 1)], labels[:, k + 1 :])
        return total

    return loss


def _oracle_loss(cfg, tensors, config):
    out, labels = oracle.forward(tensors, config, TOKENS), _labels(cfg)

    def nll(x, y):
        return -np.take_along_axis(np.log(oracle.softmax(x)), y[..., None], -1).mean()

    total = nll(out.logits, labels)
    for k in range(cfg.num_nextn_predict_layers):
        total += 0.3 * nll(out.mtp[k][:, : -(k + 1)], labels[:, k + 1 :])
    return total


@pytest.fixture(scope="module")
def graded():
    """(cfg, params, bias, gradients): one dense layer, and a MoE layer in the MTP module."""
    cfg = dataclasses.replace(V3, num_hidden_layers=1, num_nextn_predict_layers=1)
    params, bias = weights(cfg)
    return cfg, params, bias, jax.jit(jax.grad(_jax_loss(cfg, bias)))(params)


def test_gradients_against_finite_differences_in_float64(graded):
    """Along one random direction per leaf: two evaluations of the oracle tell the derivative."""
    cfg, params, bias, grads = graded
    rng, eps = np.random.default_rng(3), 1e-5
    for path in leaves(cfg):
        g = np.asarray(get(grads, path), np.float64)
        direction = rng.standard_normal(g.shape)
        direction /= np.linalg.norm(direction)
        ends = []
        for sign in (1, -1):
            moved = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
            get(moved, path)[...] += sign * eps * direction
            ends.append(_oracle_loss(cfg, *checkpoint(cfg, moved, bias)))
        numeric = (ends[0] - ends[1]) / (2 * eps)
        typical = np.linalg.norm(g) / np.sqrt(g.size)  # a derivative may happen to be near zero
        assert typical > 0, path
        assert abs((g * direction).sum() - numeric) < 1e-4 * max(typical, abs(numeric)), path


@pytest.mark.parametrize("remat", REMAT[1:])
def test_recomputation_does_not_change_gradients(graded, remat):
    cfg, params, bias, want = graded
    got = jax.jit(jax.grad(_jax_loss(cfg, bias, remat)))(params)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), got, want)


def test_what_is_kept_for_the_backward_pass():
    """Of a dense block: every activation once, in its own dtype; neither casts nor weights a second time. "deepseek":
    no norm's output, no queries, keys or values per head. "full": the input."""
    cfg = dataclasses.replace(V3, dtype="bfloat16")
    h, (b, t), d, f = cfg.num_attention_heads, TOKENS.shape, cfg.hidden_size, cfg.intermediate_size
    q, c, r, v = cfg.q_lora_rank, cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.v_head_dim
    x = jax.ShapeDtypeStruct((b, t, d), jnp.bfloat16)
    p = abstract(block_params(cfg, False), jnp.bfloat16)
    rope = rope_table(cfg, jnp.arange(t)[None])
    weights = [w.shape for w in jax.tree.leaves(p)]

    def kept(remat):
        ctx = Context(rope, single_device(remat))
        layer = recompute(lambda p, x: block(p, cfg, x, None, ctx)[0], remat)
        vjp = jax.eval_shape(lambda p, x: jax.vjp(layer, p, x)[1], p, x)
        arrays = [w for w in jax.tree.leaves(vjp) if w.ndim]
        others = {w.shape for w in arrays if w.dtype != jnp.bfloat16}
        assert others <= {(b, h, t), (1, t, r // 2), (1, t, 1, r // 2)}  # log-sum-exp; cos and sin
        return collections.Counter(w.shape for w in arrays if w.dtype == jnp.bfloat16)

    stream, down = [x.shape] * 2, [(b, t, q)]  # before attention and FFN
    core, wide = [(b, t, h, v)], [(b * t, f)] * 2  # of the FFN: gate and up
    per_head = [(b, h, t, cfg.qk_head_dim)] * 2 + [(b, h, t, v)]
    normed = [*stream, (b, t, q), (b, t, c)]
    assert kept("none") == collections.Counter(
        weights + stream + down + [(b, t, c)] + normed + per_head + core + wide
    )
    assert kept("deepseek") == collections.Counter(weights + stream + down + [(b, t, c + r)] + core + wide)
    assert kept("full") == collections.Counter([*weights, x.shape])


def test_unknown_recomputation_is_named():
    with pytest.raises(ValueError, match="remat='half'"):
        recompute(lambda x: x, "half")


# --- parts ---------------------------------------------------------------------------------------------


def test_the_halves_of_a_block_as_modules():
    """The Linen modules are the functions that a block runs."""
    cfg = dataclasses.replace(V3, num_nextn_predict_layers=0)
    params, _ = weights(cfg)
    p = jax.tree.map(lambda w: w[0], params["moe_layers"])
    x = np.random.default_rng(2).standard_normal((2, 9, cfg.hidden_size)).astype(np.float32)
    ctx = context(cfg, Inputs(TOKENS), single_device())

    @jax.jit
    def both(p, x):
        attended = x + MLA(cfg).apply({"params": p["attn"]}, rms_norm(x, p["attn_norm_d"], cfg.rms_norm_eps))
        second = {name: p[name] for name in ("ffn", "ffn_norm_d")}
        return block(p, cfg, x, None, ctx), DeepSeekMoE(cfg).apply({"params": second}, attended)

    (want, stats), (got, got_stats) = both(p, x)
    assert rel(got, want) < CLOSE
    chex.assert_trees_all_close(got_stats, stats, rtol=CLOSE)


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 3, 4)], ids=str)
def test_stages_cut_out_of_the_model(cuts):
    """Embedding, layers i to j, final norm and MTP, one after the other, are the whole."""
    cfg = dataclasses.replace(V3, num_hidden_layers=5, first_k_dense_replace=2)
    params, bias = weights(cfg)

    @jax.jit
    def both(params):
        inputs = Inputs(TOKENS)
        ctx = context(cfg, inputs, single_device())
        x, parts = embedded(params, cfg, inputs, ctx), []
        for start, stop in itertools.pairwise((0, *cuts, 5)):
            x, stats_of_part = layers(params, cfg, x, bias, ctx, range(start, stop))
            parts.append(stats_of_part)
        h = final_norm(params, cfg, x)
        hidden, stats = mtp_hidden(params, cfg, h, inputs, bias[cfg.num_moe_layers :], ctx)
        counts = [part.counts_e for part in parts] + [stats.counts_e]
        return (h, hidden, jnp.concatenate(counts)), forward(params, cfg, inputs, bias, single_device())

    (h, hidden, counts), (want, aux) = both(params)
    assert rel(h, want) < CLOSE and rel(hidden, aux.mtp) < CLOSE
    np.testing.assert_array_equal(counts, aux.expert_counts_le)


# --- depth ------------------------------------------------------------------------------------------------


def test_the_traced_program_does_not_grow_with_depth():
    def lines(layers):
        cfg = dataclasses.replace(V3, num_hidden_layers=layers, num_nextn_predict_layers=0)
        params = abstract(model_params(cfg))
        step = jax.grad(lambda p: forward(p, cfg, Inputs(TOKENS), None, single_device())[0].sum())
        return jax.jit(step).lower(params).as_text().count("\n")

    deep = UNROLL_LAYERS + 2  # both stacks as loops: the dense one has one layer either way
    assert lines(61) == lines(deep)

"""Training steps under an FP8 policy: near bf16's, weights quantised once, BF16 and FP32 where the report keeps them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import MeshConfig
from deepseek_jax.model.layers import linear
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import attach, quantise_weights
from deepseek_jax.parallel import zero
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.precision import PRESETS
from deepseek_jax.precision.product import Quantised, quantise_weight
from deepseek_jax.training.labels import totals
from deepseek_jax.training.step import make_train_step
from tests.tiny_run import HYPER, fresh_state, gradients, losses, tiny, tokens

SMALL = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
POLICY = PRESETS["deepseek_fp8"]


def small(**train):
    return tiny(precision="deepseek_fp8", model=SMALL, train={"remat": "deepseek"} | train)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_training_follows_bf16():
    """Every step's loss within the report's 0.25% of the unquantised model's, and not equal to it."""
    cfg = small(grad_accumulation=2)
    plain = jax.jit(
        lambda params, bias, batch: losses(params, cfg, batch, bias, totals(cfg, batch, 4))["loss"]
    )
    step, state = make_train_step(cfg, one_device()), fresh_state(cfg)
    errors = []
    for i in range(4):
        batch = {"tokens": jnp.asarray(tokens(cfg, i))}
        want = float(plain(state.params, state.balance_bias, batch))
        state, metrics = step(state, batch, HYPER)
        errors.append(abs(float(metrics.scalars["loss"]) / want - 1))
    assert metrics.finite and min(errors) > 0 and max(errors) < 2.5e-3
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    moments = [x for x in jax.tree.leaves(state.opt_state) if jnp.ndim(x) > 1]
    assert moments and all(x.dtype == jnp.bfloat16 for x in moments)


def test_only_linear_layers_are_quantised():
    cfg, params = tiny().model, fresh_state(tiny()).params
    quantise = functools.partial(quantise_weights, declared=model_params(cfg), policy=POLICY)
    attached = attach(params, jax.eval_shape(quantise, params), POLICY)
    leaves = jax.tree_util.tree_flatten_with_path(attached, is_leaf=lambda x: isinstance(x, Quantised))[0]
    plain = {path[-1].key for path, leaf in leaves if not isinstance(leaf, Quantised)}
    norms = {"scale_d", "norm_d", "enorm_d", "hnorm_d", "attn_norm_d", "ffn_norm_d", "q_norm_q", "kv_norm_c"}
    assert plain == {"w_embed_vd", "w_head_dv", "w_gate_de"} | norms


def test_weights_are_quantised_once_for_all_micro_batches(monkeypatch):
    cfg, seen = small(grad_accumulation=2), []
    monkeypatch.setattr(zero, "quantise_weight", lambda w, *by: seen.append(w) or quantise_weight(w, *by))
    jax.eval_shape(make_train_step(cfg, one_device()), fresh_state(cfg), {"tokens": tokens(cfg)}, HYPER)
    declared = jax.tree.leaves(model_params(cfg.model), is_leaf=lambda p: hasattr(p, "n_in"))
    assert len(seen) == sum(p.n_in is not None for p in declared) > 0


def test_a_matrix_is_quantised_as_the_layer_multiplies_it():
    """Heads merge into the input or the output of the matrix, layers and experts stay apart."""
    cfg = tiny().model
    params = fresh_state(tiny()).params
    quantised = quantise_weights(params, model_params(cfg), POLICY)["moe_layers"]
    wo = params["moe_layers"]["attn"]["wo_hvd"]
    fprop, dgrad = quantised["attn"]["wo_hvd"]
    want = quantise_weight(wo[0].reshape(-1, wo.shape[-1]), POLICY)
    np.testing.assert_array_equal(fprop.q[0].astype(jnp.float32), want[0].q.astype(jnp.float32))
    np.testing.assert_array_equal(dgrad.scale[0], want[1].scale)
    e, d, f = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
    assert quantised["ffn"]["experts"]["w_gate_edf"][0].q.shape == (1, e, f, d)
    assert quantised["ffn"]["gate"]["w_gate_de"] is None


def test_values_above_240_survive_recomputation():
    """E4M3 reaches 448; what `jax.checkpoint` saves must not lose the last octave."""
    w = Quantised(jnp.eye(128), *quantise_weight(jnp.eye(128), POLICY), POLICY)
    x = jnp.full((2, 128), 1.0).at[:, 0].set(1.1)

    def loss(x, w):
        return (linear(linear(x, w), w) ** 2).sum()

    keep_all = jax.checkpoint_policies.everything_saveable
    value, grads = jax.value_and_grad(jax.checkpoint(loss, policy=keep_all), (0, 1))(x, w)
    want, want_grads = jax.value_and_grad(loss, (0, 1))(x, w)
    assert value == want
    np.testing.assert_array_equal(grads[1].master, want_grads[1].master)


def test_gradients_do_not_depend_on_how_large_the_global_batch_is():
    """At the report's 62,914,560 tokens per step the gradients of the mean are of 1e-10: bitwise the same numbers."""
    cfg, state = small(), fresh_state(small())
    batch = {"tokens": jnp.asarray(tokens(cfg))}
    n = 2**19 * cfg.train.batch_size

    @functools.partial(jax.jit, static_argnums=0)
    def of_batch(sequences):
        params = state.params, quantise_weights(state.params, model_params(cfg.model), POLICY)
        return gradients(*params, cfg, batch, state.balance_bias, totals(cfg, batch, sequences))

    small_batch, large_batch = of_batch(cfg.train.batch_size), of_batch(n)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b * 2.0**19), small_batch, large_batch)

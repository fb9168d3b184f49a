"""The objective of GRPO on states of a model, and on a model over meshes; nothing but the policy's loss moves the policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.id_sets import packed
from deepseek_jax.model.sequence import Whole
from deepseek_jax.model.transformer import Aux
from deepseek_jax.parallel.layout import layout_over
from deepseek_jax.parallel.mesh import abstract_mesh, batch_sharding, make_mesh
from deepseek_jax.posttraining.grpo_config import GRPOLossConfig
from deepseek_jax.posttraining.grpo_loss import grpo_loss
from deepseek_jax.posttraining.logprobs import make_logprob_step
from deepseek_jax.posttraining.objective import grpo
from deepseek_jax.training.gradients import value_of
from deepseek_jax.training.labels import totals
from deepseek_jax.training.objectives import Outputs
from deepseek_jax.training.state import state_shardings
from deepseek_jax.training.step import abstract_state, make_train_step
from tests.tiny_run import HYPER, fresh_state, tiny

REORDERED = 1e-5  # float32 sums in another order, as in test_step
TEMPERATURE = 0.7
T = 16
LOSS = GRPOLossConfig(beta=0.04, off_policy_delta=0.05)


def config(**train):
    return tiny(
        model={"num_hidden_layers": 1, "first_k_dense_replace": 0},
        data={"seq_len": T},
        optimizer={"moment_dtype": "float32", "clip_norm": 1e9},
        train={"detached_mtp": True, "loss_chunk": 24, **train},
    )


CFG = config()
V = CFG.model.vocab_size


def outputs(rows=8, seed=0):
    """Rows of a prompt, an output and padding; one has no output, one is nothing but padding."""
    rng, at = np.random.default_rng(seed), np.arange(T + 1)
    prompt = rng.integers(1, 6, (rows, 1))
    end = prompt + rng.integers(2, 11, (rows, 1))
    end[2], prompt[2] = prompt[2], prompt[2]
    end[5] = 0
    tokens = rng.integers(0, V, (rows, T + 1), np.int32)
    kept = rng.uniform(size=(rows, T + 1, V)) < 0.5
    np.put_along_axis(kept, tokens[..., None].astype(np.int64), True, -1)
    logp = rng.normal(-5, 0.5, (3, rows, T + 1)).astype(np.float32)
    return {
        "tokens": tokens,
        "loss_mask": (at >= prompt) & (at < end),
        "padding": at >= end,
        "advantages": rng.standard_normal(rows).astype(np.float32),
        "old_logp": logp[0],
        "ref_logp": logp[0] + 0.2 * logp[1] + 1,
        "sampler_logp": logp[0] + 0.1 * logp[2] + 0.5,
        "kept": np.asarray(packed(jnp.asarray(kept.reshape(-1, V)))).reshape(rows, T + 1, -1),
    }, kept


# --- on states ----------------------------------------------------------------------------------------------------


class Half(Whole):
    """The first or the second half of every sequence, whose sums are given."""

    def __init__(self, half):
        self.half = half

    def own(self, x_bt):
        return jnp.split(x_bt, 2, axis=1)[self.half]

    def total(self, x):
        return jax.lax.psum(x, "tensor")


RNG = np.random.default_rng(1)
H, HEAD = RNG.standard_normal((8, T, 12)).astype(np.float32), RNG.standard_normal((12, V)).astype(np.float32)
SMALL = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, num_nextn_predict_layers=0))
ZERO = jnp.zeros((), jnp.float32)


@jax.jit
def of_states(h_btd, batch):
    out = Outputs(h_btd, HEAD, Aux(jnp.zeros((0, 8), jnp.int32), ZERO, ZERO, None), Whole())
    return grpo(SMALL, LOSS, TEMPERATURE)(out, batch, totals(SMALL, batch, 8), HYPER)


def distributions(kept):
    """Of each label, float64 [b, t, v]."""
    logits = np.where(kept[:, 1:], H.astype(np.float64) @ HEAD / TEMPERATURE, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_each_token_has_its_own_column():
    """The label of position i is token i + 1, and so are all that belongs to it: end token included, prompt not."""
    batch, kept = outputs()
    p = distributions(kept)
    of_tokens = np.take_along_axis(p, batch["tokens"][:, 1:, None].astype(np.int64), -1)[..., 0]
    logp = np.pad(np.log(of_tokens), ((0, 0), (1, 0)))
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    mask = batch["loss_mask"]

    def loss(mask=mask, shift=0):
        old, ref, sampler = (
            np.roll(batch[name], shift, 1) for name in ("old_logp", "ref_logp", "sampler_logp")
        )
        options = {name: getattr(LOSS, name) for name in ("kl", "beta", "off_policy_delta")}
        return grpo_loss(
            logp.astype(np.float32), old, ref, batch["advantages"], mask, sampler_logp=sampler, **options
        )

    scalar, metrics = of_states(H, batch)
    value, known = loss()
    np.testing.assert_allclose([scalar, metrics["loss"]], value, rtol=REORDERED)
    for name, x in known.items():
        np.testing.assert_allclose(metrics[name], x, rtol=REORDERED, err_msg=name)
    np.testing.assert_allclose(metrics["entropy"], entropy[mask[:, 1:]].mean(), rtol=REORDERED)
    assert metrics["dropped_share"] > 0
    last = mask & ~np.roll(mask, -1, 1)
    for other in (loss(shift=1)[0], loss(shift=-1)[0], loss(mask & ~last)[0], loss(~batch["padding"])[0]):
        assert abs(other - value) > 1e-4


def test_values_of_the_sampler_keep_the_models_gradient():
    """The loss is that of the exact log-probabilities; what is differentiated, the model's own."""
    batch, _ = outputs()
    exact = {
        "exact_logp": batch["old_logp"],
        "ref_logp": batch["old_logp"],
        "sampler_logp": batch["old_logp"],
    }
    (scalar, metrics), gradient = jax.jit(jax.value_and_grad(of_states, has_aux=True))(H, batch | exact)
    assert metrics["ratio_distance"] == 0 and metrics["sampler_gap_max"] == 0 and metrics["kl"] == 0
    answered = batch["loss_mask"].any(1)
    np.testing.assert_allclose(scalar, -batch["advantages"][answered].mean(), rtol=REORDERED)
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": None}, r"a batch for GRPO has no \['advantages'\]: it has \['kept'"),
        ({"ref_logp": None}, r"has no \['ref_logp'\]"),
        ({"old_logp": np.zeros((8, T), np.float32)}, r"batch\['old_logp'\] is float32\[8, 16\]; it should be float32\[8, 17\]"),
        ({"kept": np.zeros((8, T + 1), np.uint32)}, r'batch\["kept"\] is uint32\[8, 17\]; it should be uint32\[8, 17, \'words\'\]'),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit(change, message):
    batch = {name: x for name, x in (outputs()[0] | change).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(of_states, H, batch)


def test_what_cannot_be_trained():
    with pytest.raises(
        ValueError, match=r"train\.detached_mtp=False: the loss of the MTP modules would move"
    ):
        grpo(config(detached_mtp=False), LOSS)
    with pytest.raises(ValueError, match=r"temperature=0 must be > 0"):
        grpo(CFG, LOSS, 0)


# --- on a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    """(params, bias, batch, hyper) -> ((scalar, parts), gradient) on one device, all at once."""
    layout = layout_over(CFG, make_mesh(CFG.mesh, jax.devices()[:1]))

    def run(params, bias, batch, hyper):
        total = totals(CFG, batch, len(batch["tokens"]))
        return value_of(CFG, layout, grpo(CFG, LOSS, TEMPERATURE))(params, batch, bias, total, hyper)

    return jax.jit(jax.value_and_grad(run, has_aux=True))


@pytest.fixture(scope="module")
def state():
    return fresh_state(CFG)


def test_a_mesh_and_micro_batches_change_nothing(alone, state):
    """Two devices with sequences of their own, each divided over two, in two micro-batches of unlike outputs."""
    batch, _ = outputs()
    (_, parts), gradient = alone(state.params, state.balance_bias, batch, HYPER)
    mesh_cfg = dataclasses.replace(CFG.mesh, data=2, tensor=2)
    cfg = dataclasses.replace(config(grad_accumulation=2, batch_size=8), mesh=mesh_cfg)
    mesh = make_mesh(cfg.mesh, jax.devices()[:4])
    step = make_train_step(cfg, mesh, grpo(cfg, LOSS, TEMPERATURE))
    laid_out = jax.device_put(jax.device_get(state), state_shardings(cfg, mesh))
    after, metrics = step(laid_out, jax.device_put(batch, batch_sharding(mesh)), HYPER)
    for name, x in parts.metrics.items():
        np.testing.assert_allclose(metrics.scalars[name], x, rtol=REORDERED, atol=1e-7, err_msg=name)
    np.testing.assert_array_equal(metrics.counts_le, parts.counts_le)
    for x, y in zip(*map(jax.tree.leaves, jax.device_get((after.opt_state.mu, gradient))), strict=True):
        assert np.linalg.norm(10 * x - y) <= REORDERED * np.linalg.norm(y)  # 1 - beta_1 = 0.1


def test_the_mtp_modules_do_not_move_the_policy(alone, state):
    """Their loss reaches their own parameters, and nothing else: neither trunk nor embedding nor head, by a bit."""
    batch, _ = outputs()
    gradients = [
        alone(state.params, state.balance_bias, batch, HYPER._replace(mtp_lambda=np.float32(x)))[1]
        for x in (0, 0.3)
    ]
    for name, (without, with_mtp) in {name: [g[name] for g in gradients] for name in gradients[0]}.items():
        same = jax.tree.map(lambda x, y: bool((x == y).all()), without, with_mtp)
        assert all(jax.tree.leaves(same)) == (name != "mtp")
    weights = jax.tree.leaves(gradients[1]["mtp"])
    assert sum(bool(np.abs(x).max() > 0) for x in weights) > len(weights) // 2


def test_log_probabilities_of_a_batch_are_those_of_the_objective(alone, state):
    """On policy the ratio is 1, of the distribution drawn from: at another temperature, or without the sets, it is not."""
    batch, _ = outputs()
    step = make_logprob_step(CFG, make_mesh(CFG.mesh, jax.devices()[:1]), TEMPERATURE)
    found = jax.device_get(step(state.params, state.balance_bias, batch))
    assert found.logp.shape == batch["tokens"].shape
    np.testing.assert_array_equal(found.logp != 0, batch["loss_mask"])
    on_policy = batch | {"old_logp": found.logp, "sampler_logp": found.logp}
    metrics = alone(state.params, state.balance_bias, on_policy, HYPER)[0][1].metrics
    # Float32 logits of size 1 in other orders, of 384 summed up.
    assert (
        metrics["sampler_gap_max"] < 1e-5 and metrics["ratio_distance"] < 1e-5 and metrics["clip_share"] == 0
    )
    np.testing.assert_allclose(metrics["entropy"], found.entropy[batch["loss_mask"]].mean(), rtol=REORDERED)
    without = jax.device_get(step(state.params, state.balance_bias, batch | {"kept": 0 * batch["kept"]}))
    wrong = batch | {"old_logp": without.logp}
    assert alone(state.params, state.balance_bias, wrong, HYPER)[0][1].metrics["ratio_distance"] > 0.5


@pytest.mark.parametrize("mesh", [{"node": 2}, {"pipe": 2, "schedule": "one_f_one_b"}])
def test_fp8_and_a_pipeline_are_traced(mesh):
    """With experts of other devices, and with layers of others, in micro-batches."""
    sections = {
        "precision": "deepseek_fp8",
        "mesh": mesh,
        "train": {"detached_mtp": True, "grad_accumulation": 4, "batch_size": 8},
    }
    cfg = tiny(model={"num_hidden_layers": 3}, data={"seq_len": T}, **sections)
    over = abstract_mesh(cfg.mesh, 2)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs()[0])
    step = make_train_step(cfg, over, grpo(cfg, LOSS, TEMPERATURE))
    _, metrics = jax.eval_shape(step, abstract_state(cfg, over), batch, HYPER)
    assert {"kl", "sampler_gap_max", "mtp_loss", "balance_loss"} < set(metrics.objective)

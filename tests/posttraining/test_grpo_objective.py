"""The objective of GRPO on states of a model, and on a model over meshes; nothing but the policy's loss moves the policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.dispatch import Local
from deepseek_jax.model.layout import Inputs, Layout
from deepseek_jax.model.mtp import mtp_hidden
from deepseek_jax.model.sequence import Whole
from deepseek_jax.model.transformer import Aux, context
from deepseek_jax.parallel.layout import layout_over
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.tensor import Divided
from deepseek_jax.posttraining.grpo_loss import grpo_loss
from deepseek_jax.posttraining.logprobs import make_logprob_step
from deepseek_jax.posttraining.objective import drawn_logprobs, grpo
from deepseek_jax.training.gradients import value_of
from deepseek_jax.training.labels import totals
from deepseek_jax.training.objectives import Outputs
from tests.oracle.tiny import weights
from tests.posttraining.grpo_batches import LOSS, TEMPERATURE, T, V, config, outputs
from tests.tiny_run import HYPER, fresh_state

REORDERED = 1e-5  # float32 sums in another order, as in test_step
CFG = config()


# --- on states ----------------------------------------------------------------------------------------------------


RNG = np.random.default_rng(1)
H, HEAD = RNG.standard_normal((8, T, 12)).astype(np.float32), RNG.standard_normal((12, V)).astype(np.float32)
SMALL = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, num_nextn_predict_layers=0))
ZERO = jnp.zeros((), jnp.float32)


@jax.jit
def of_states(h_btd, batch):
    out = Outputs(h_btd, HEAD, Aux(jnp.zeros((0, 8), jnp.int32), ZERO, ZERO, None), Whole())
    return grpo(SMALL, LOSS, TEMPERATURE)(out, batch, totals(SMALL, batch, 8), HYPER)


def test_devices_and_micro_batches_change_nothing():
    """Rows are divided over micro-batches of unlike outputs, tokens over two devices, each of which has its own part."""
    batch, _ = outputs()
    total = totals(SMALL, batch, 8)
    (scalar, metrics), gradient = jax.jit(jax.value_and_grad(of_states, has_aux=True))(H, batch)

    def part(h_btd, rows):
        out = Outputs(h_btd, HEAD, Aux(jnp.zeros((0, 8), jnp.int32), ZERO, ZERO, None), Divided())
        return grpo(SMALL, LOSS, TEMPERATURE)(out, rows, total, HYPER)

    run = jax.jit(jax.vmap(jax.value_and_grad(part, has_aux=True), (0, None), axis_name="tensor"))
    found = []
    for at in (slice(0, 4), slice(4, 8)):
        halves = np.stack(np.split(H[at], 2, axis=1))
        found.append(jax.device_get(run(halves, {name: x[at] for name, x in batch.items()})))
    np.testing.assert_allclose(sum(one[0][0].sum() for one in found), scalar, rtol=REORDERED)
    got = np.concatenate([np.concatenate(one[1], axis=1) for one in found])
    assert np.linalg.norm(got - gradient) < REORDERED * np.linalg.norm(gradient)
    for name, x in metrics.items():
        parts = [one[0][1][name] for one in found]
        of = max(part.max() for part in parts) if name.endswith("_max") else sum(part.sum() for part in parts)
        np.testing.assert_allclose(of, x, rtol=REORDERED, atol=1e-7, err_msg=name)


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


def test_ids_that_no_tokenizer_knows_have_no_probability():
    """Nobody draws them: the model's ids from 300 on."""
    batch = {"tokens": outputs()[0]["tokens"] % 300}

    def of(head):
        found = drawn_logprobs(Whole(), head, batch, H, T, 24, TEMPERATURE, num_ids=300)
        return found.logp.sum(), found

    (_, found), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(HEAD)
    logits = (H.astype(np.float64) @ HEAD / TEMPERATURE)[..., :300]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = np.take_along_axis(logp, batch["tokens"][:, 1:, None].astype(np.int64), -1)[..., 0]
    np.testing.assert_allclose(found.logp, want, rtol=REORDERED, atol=1e-5)
    entropy = -(np.exp(logp) * logp).sum(-1)
    np.testing.assert_allclose(found.entropy, entropy, rtol=REORDERED, atol=1e-5)
    assert not gradient[:, 300:].any() and gradient[:, :300].any(0).all()


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


def test_the_mtp_modules_do_not_move_the_policy():
    """Where they are detached, their gradient ends at what they read: neither trunk nor embedding has a part of it."""
    cfg = config().model
    params, bias = weights(cfg)
    h_btd = H[:2, :, :1] * np.ones(cfg.hidden_size, np.float32)
    tokens = Inputs(outputs()[0]["tokens"][:2, :-1])

    def grads(detached):
        layout = Layout(Local(), detached_mtp=detached)

        def of(params, h_btd):
            ctx = context(cfg, tokens, layout)
            return (mtp_hidden(params, cfg, h_btd, tokens, bias[-1:], ctx)[0] ** 2).sum()

        of_params, of_trunk = jax.grad(of, (0, 1))(params, h_btd)
        return of_params["mtp"], {"trunk": of_trunk, "embedding": of_params["embed"]}

    (own, none), (joint, moved) = jax.jit(lambda: (grads(True), grads(False)))()
    for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(joint), strict=True):
        np.testing.assert_allclose(x, y, rtol=REORDERED, atol=1e-6)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(none))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(moved))


def test_log_probabilities_of_a_batch_are_those_of_the_objective():
    """On policy the ratio is 1, of the distribution drawn from; without the sets it is not."""
    batch, _ = outputs()
    mesh, state = make_mesh(CFG.mesh, jax.devices()[:1]), fresh_state(SMALL)
    step = make_logprob_step(SMALL, mesh, TEMPERATURE)
    found = jax.device_get(step(state.params, state.balance_bias, batch))
    assert found.logp.shape == batch["tokens"].shape
    np.testing.assert_array_equal(found.logp != 0, batch["loss_mask"])

    @jax.jit
    def metrics(old_logp):
        with_old = batch | {"old_logp": old_logp, "sampler_logp": old_logp}
        value = value_of(SMALL, layout_over(SMALL, mesh), grpo(SMALL, LOSS, TEMPERATURE))
        total = totals(SMALL, with_old, len(old_logp))
        return value(state.params, with_old, state.balance_bias, total, HYPER)[1].metrics

    got = metrics(found.logp)
    # Float32 logits of size 1 in other orders, of 384 summed up.
    assert got["sampler_gap_max"] < 1e-5 and got["ratio_distance"] < 1e-5 and got["clip_share"] == 0
    np.testing.assert_allclose(got["entropy"], found.entropy[batch["loss_mask"]].mean(), rtol=REORDERED)
    without = jax.device_get(step(state.params, state.balance_bias, batch | {"kept": 0 * batch["kept"]}))
    assert metrics(without.logp)["ratio_distance"] > 0.5

"""GRPO's loss against known values and a NumPy oracle; of each mistake that others made, what it would have given."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.posttraining.grpo_config import AGGREGATES, KLS, PRESETS, RATIOS, GRPOLossConfig, preset
from deepseek_jax.posttraining.grpo_loss import Part, grpo_loss

FORMS = tuple(itertools.product(RATIOS, KLS, AGGREGATES))
ROWS, T = 5, 8
LENGTH = 4  # of aggregate "constant"

# All tests run few programs, of arrays of one shape. Two outputs, of three and of two tokens, are known; what stands where
# no token is counts nowhere, and rows without any are no outputs.
NOTHING = np.nan
KNOWN = {
    "new": [[-0.5, -1, -2], [-0.7, -1.5]],
    "old": [[-0.6, -1, -1.5], [-0.7, -1.2]],
    "ref": [[-0.5, -1.2, -1.8], [-0.9, -1.4]],
}
A = np.array([1.0, -1, 0, 0, 0])
LOSSES = {  # aggregate -> (k3, unbiased)
    "output": (-0.0014436895, -0.0015132338),
    "token": (-0.1818280341, -0.1819061264),
    "constant": (-0.1136425213, -0.1136913290),
}


@pytest.fixture(autouse=True)
def exactly():
    with jax.enable_x64(True):
        yield


BETA = 0.04  # in all tests: where it is not to be seen, the reference is the policy


@functools.partial(jax.jit, static_argnames=("forms", "fixed"))
def _run(forms, fixed, arrays, sampler_logp, part):
    def one(ratio, kl, aggregate):
        def of(new):
            options = {
                "ratio": ratio,
                "kl": kl,
                "aggregate": aggregate,
                "constant_length": LENGTH,
                **dict(fixed),
            }
            return grpo_loss(
                new, *arrays[1:], sampler_logp=sampler_logp, part=Part(*part), **{"beta": BETA} | options
            )

        (loss, metrics), gradient = jax.value_and_grad(of, has_aux=True)(arrays[0])
        return loss, metrics, gradient

    return {form: one(*form) for form in forms}


def run(arrays, forms=FORMS, sampler_logp=None, numbers=(None, None), **fixed):
    """form -> (loss, metrics, gradient). numbers: of outputs and tokens."""
    return jax.device_get(_run(forms, tuple(sorted(fixed.items())), arrays, sampler_logp, numbers))


def loss(arrays, form=("token", "k3", "output"), **options):
    return run(arrays, **options)[form][0]


def of_rows(rows):
    x = np.full((ROWS, T), NOTHING)
    for i, row in enumerate(rows):
        x[i, : len(row)] = row
    return x


def known(a=A):
    new, old, ref = (of_rows(KNOWN[name]) for name in ("new", "old", "ref"))
    return new, old, ref, a, ~np.isnan(new)


def drawn(seed):
    """Outputs of unlike lengths, one of them empty."""
    rng = np.random.default_rng(seed)
    length = np.array([3, 0, 8, 5, 2])
    mask = rng.permuted(np.arange(T)[None] < length[:, None], axis=1)
    new = rng.normal(-1.5, 0.5, (ROWS, T))
    old, ref = new + rng.normal(0, 0.2, new.shape), new + rng.normal(0, 0.3, new.shape)
    return new, old, ref, rng.standard_normal(ROWS), mask


# --- known values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-6)])
def test_known_losses(dtype, tolerance):
    forms = FORMS if dtype == np.float64 else FORMS[:6]
    got = run(tuple(x if x.dtype == bool else x.astype(dtype) for x in known()), forms)
    for aggregate, want in LOSSES.items():
        found = [got["token", kl, aggregate][0] for kl in KLS]
        assert found[0].dtype == dtype
        np.testing.assert_allclose(found, want, rtol=0, atol=tolerance)
        # The means and the estimates differ by far more than the tolerance.
        assert abs(found[0] - found[1]) > 4e-5
        others = [got["token", "k3", other][0] for other in AGGREGATES if other != aggregate]
        assert min(abs(found[0] - other) for other in others) > 1e-2


def test_known_ratios_and_divergences():
    """One token at a time, with an advantage of 1 and nothing clipped, is minus its ratio."""
    new, old, ref, _, mask = known()
    at = np.zeros((ROWS, T), bool)
    at[:, 0] = True  # each token is an output of its own
    new, old, ref = (np.concatenate([x[mask], np.zeros(35)]).reshape(T, ROWS).T for x in (new, old, ref))
    found = run((new, old, new, np.ones(ROWS), at))["token", "k3", "output"]
    ratios = -found[2][:, 0] * ROWS
    np.testing.assert_allclose(ratios, [1.1051709181, 1, 0.6065306597, 1, 0.7408182207], atol=1e-9)
    np.testing.assert_allclose(-found[0], ratios.mean(), atol=1e-12)
    for i, k3 in enumerate([0, 0.01873075, 0.02140276, 0.01873075, 0.00517092]):  # known to eight digits
        one = at & (np.arange(ROWS) == i)[:, None]
        np.testing.assert_allclose(loss((new, old, ref, np.zeros(ROWS), one)) / BETA, k3, atol=5e-9)


def test_known_ratios_of_outputs():
    """Length-normalised. Their product, the report's, is another number."""
    new, old, _, _, mask = known()
    for row, mean in enumerate((0.87517332, 0.86070798)):
        one = mask & (np.arange(ROWS) == row)[:, None]
        got = run((new, old, new, np.ones(ROWS), one))
        product = np.exp((new - old)[row][mask[row]].sum())
        np.testing.assert_allclose(-got["sequence_mean", "k3", "output"][0], mean, atol=5e-9)
        np.testing.assert_allclose(-got["sequence", "k3", "output"][0], product, rtol=1e-12)
        assert abs(product - mean) > 0.1


@pytest.mark.parametrize(("row", "drift"), [(0, 0.13333333), (1, 0.15)])
def test_known_drift_of_outputs(row, drift):
    """A bad output is left out beyond it, its divergence is not; a good one stays."""
    a = np.where(np.arange(ROWS) == row, -1.0, 0.0)

    def of(times=1.0, a=a, **options):
        """As if all log-probabilities were so many times as far apart."""
        new, old, ref, _, mask = known(a)
        form = ("token", "k3", "output")
        arrays = (new, new + times * (old - new), ref, a, mask)
        found = run(arrays, (form,), off_policy_delta=drift, **options)[form]
        return found[0], found[1]["dropped_share"]

    (kept, none), (dropped, half) = of(1 - 1e-6), of(1 + 1e-6)
    assert none == 0 and half == 0.5
    np.testing.assert_allclose(dropped, loss(known(0 * a)), atol=1e-12)
    assert dropped > 1e-4 and abs(kept - dropped) > 0.1
    assert of(1 + 1e-6, a=-a)[1] == 0
    # It is the mean over the tokens, not the sum; of the sampler's probabilities, not those of another old policy.
    assert of(0.9)[1] == 0
    assert of(0.0)[1] == 0 and of(0.0, sampler_logp=known()[0] + 1.1 * drift)[1] == 0.5


# --- the oracle ---------------------------------------------------------------------------------------------------


def oracle(new, old, ref, a, mask, ratio, kl, aggregate, clip=0.2, beta=BETA):
    """Output by output, in float64."""
    total, outputs = 0.0, mask.any(1).sum()
    for row, good in zip(range(ROWS), a, strict=True):
        at = mask[row]
        n = at.sum()
        if not n:
            continue
        log_r, log_ref = (new - old)[row, at], (ref - new)[row, at]
        r = {"token": log_r, "sequence_mean": np.full(n, log_r.mean()), "sequence": np.full(n, log_r.sum())}
        of_r = np.exp(r[ratio])
        term = -np.minimum(of_r * good, np.clip(of_r, 1 - clip, 1 + clip) * good)
        if ratio == "sequence":
            log_r, log_ref = np.full(n, log_r.sum()), np.full(n, log_ref.sum())
        term = term + beta * (np.exp(log_ref) - log_ref - 1) * (np.exp(log_r) if kl == "unbiased" else 1)
        total += (
            term.sum() / {"output": n * outputs, "token": mask.sum(), "constant": LENGTH * outputs}[aggregate]
        )
    return total


def test_value_and_gradient_of_every_form():
    """The gradient of an output's ratio reaches its tokens, though each device forms its own part."""
    new, *others = drawn(3)
    rng = np.random.default_rng(0)
    for form, (value, _, gradient) in run((new, *others)).items():

        def of(new, form=form):
            return oracle(new, *others, *form)

        np.testing.assert_allclose(value, of(new), rtol=1e-12)
        for _ in range(3):
            along = rng.standard_normal(new.shape)
            slope = (of(new + 1e-5 * along) - of(new - 1e-5 * along)) / 2e-5
            # Central differences: 1e-10 times third derivatives of a few e^sum, and rounding, 1e-16 / 1e-5.
            np.testing.assert_allclose((gradient * along).sum(), slope, atol=1e-7, err_msg=str(form))
        assert not gradient[~others[-1]].any() and np.abs(gradient).max() > 0.01


# --- properties ---------------------------------------------------------------------------------------------------


def test_on_policy_it_is_the_policy_gradient():
    """Ratio exactly 1, nothing clipped, the gradient that of -A ln pi."""
    new, _, _, a, mask = drawn(1)
    form = ("token", "k3", "token")
    got = run((new, new, new, a, mask))
    got["without old"] = run((new, None, None, a, mask), (form,), beta=0.0)[form]
    for form, (_, metrics, gradient) in got.items():
        assert metrics["clip_share"] == 0 and metrics["ratio"] == 1 and metrics["ratio_distance"] == 0
        if form == "without old" or (form[0] != "sequence" and form[2] == "token"):
            # The advantage, times a token's share of the mean, rounded once each.
            np.testing.assert_allclose(gradient, np.where(mask, -a[:, None] / mask.sum(), 0), rtol=2.3e-16)


def test_on_policy_the_loss_is_the_divergence():
    """A whole group's advantages sum to 0: the loss is no sign of progress, and its gradient not small."""
    new, _, ref, _, _ = drawn(2)
    a, mask = np.array([1.0, -2, 0.5, 1.5, -1]), np.ones(new.shape, bool)
    value, metrics, gradient = run((new, new, ref, a, mask))["token", "k3", "output"]
    np.testing.assert_allclose(value, BETA * metrics["kl"], atol=1e-15)
    assert np.abs(gradient).max() > 10 * value


def test_the_corrected_divergence_has_the_gradient_of_the_divergence():
    """In expectation over what is drawn, summed up exactly. That of k3 alone, on policy, has the other divergence's."""
    rng = np.random.default_rng(0)
    logits, other = rng.standard_normal((2, ROWS))
    logp, ref = (x - np.log(np.exp(x).sum()) for x in (logits, other))
    mask = np.arange(T)[None] + np.zeros((ROWS, 1)) == 0  # one output per token of a vocabulary of five
    arrays = [np.where(mask, x[:, None], 0) for x in (logp, logp, ref)]
    got = run((*arrays, np.zeros(ROWS), mask))
    p, q = np.exp(logp), np.exp(ref)

    def expected(kl):
        """By logits: an output's gradient, weighed by its probability, times that of its log-probability."""
        of_logp = ROWS / BETA * got["token", kl, "output"][2][:, 0]
        return (p * of_logp) @ (np.eye(ROWS) - p[None])

    divergence = p * (logp - ref - (p * (logp - ref)).sum())  # the gradient of sum p ln(p / q)
    np.testing.assert_allclose(expected("unbiased"), divergence, atol=1e-14)
    np.testing.assert_allclose(expected("k3"), p - q, atol=1e-14)  # that of sum q ln(q / p)
    assert np.abs(divergence - (p - q)).max() > 0.01


def test_silent_outputs_pay_their_divergence():
    """With an advantage of 0 an output is not still: groups that say nothing are left out, or pulled back."""
    new, old, ref, a, mask = drawn(4)
    gradients = [run((new, old, to, 0 * a, mask))["token", "k3", "output"][2] for to in (ref, new)]
    assert gradients[0][mask].all() and not gradients[1].any()


def test_the_correction_takes_the_ratio_of_tokens():
    """Also where the policy's ratio is an output's: that would correct every token by the others' drift."""
    new, old, ref, a, mask = drawn(5)
    got = run((new, old, ref, 0 * a, mask))
    found = [got[ratio, "unbiased", "output"][0] / BETA for ratio in ("token", "sequence_mean")]
    n = np.maximum(mask.sum(1), 1)
    k3 = np.where(mask, np.exp(ref - new) - (ref - new) - 1, 0).sum(1) / n
    mean = np.exp(np.where(mask, new - old, 0).sum(1) / n)
    assert found[0] == found[1] and abs((k3 * mean).sum() / 4 - found[0]) > 1e-4


def test_every_drawn_token_is_an_action():
    """The end token as well: without the last of each output the loss is another, and an end is never learned."""
    last = np.zeros((ROWS, T), bool)
    last[0, 2] = last[1, 1] = True
    new, old, ref, a, mask = known()
    plain, turned = (
        run((new, old, new, s * a, mask))["token", "k3", "output"][2][last] != 0 for s in (1, -1)
    )
    # Both have become less likely, the second by more than the clip lets a bad output go.
    assert plain.tolist() == [True, False] and turned.tolist() == [False, True]
    assert abs(loss(known()) - loss((new, old, ref, a, mask & ~last))) > 1e-2


def test_parts_of_a_batch_add_up():
    """Micro-batches and devices of unlike numbers of tokens: what they are divided by is the whole batch's."""
    whole = drawn(6)
    mask = whole[-1]
    numbers = (np.float64(mask.any(1).sum()), np.float64(mask.sum()))
    parts = [(*whole[:-1], mask & np.isin(np.arange(ROWS), rows)[:, None]) for rows in ((0, 1), (2,), (3, 4))]
    want, alone = run(whole), [run(part) for part in parts]
    found = [run(part, numbers=numbers) for part in parts]
    for form in FORMS:
        value, metrics, gradient = want[form]
        np.testing.assert_allclose(sum(part[form][0] for part in found), value, rtol=1e-11)
        np.testing.assert_allclose(sum(part[form][2] for part in found), gradient, atol=1e-15)
        assert abs(np.mean([part[form][0] for part in alone]) - value) > 1e-4
        for name, x in metrics.items():
            of = [part[form][1][name] for part in found]
            np.testing.assert_allclose(
                max(of) if name.endswith("_max") else sum(of), x, rtol=1e-11, err_msg=name
            )


def test_outputs_divided_over_devices():
    """Each has half of every output's tokens, and differentiates its own part."""
    new, old, ref, a, mask = drawn(7)
    forms = tuple((ratio, "unbiased", "output") for ratio in RATIOS)
    delta = {"off_policy_delta": 0.02}

    def part(new, old, ref, mask):
        whole = (4.0, float(drawn(7)[-1].sum()), functools.partial(jax.lax.psum, axis_name="tensor"))
        return _run.__wrapped__(forms, tuple(delta.items()), (new, old, ref, a, mask), None, whole)

    halves = [np.stack(np.split(x, 2, axis=1)) for x in (new, old, ref, mask)]
    got = jax.device_get(jax.jit(jax.vmap(part, axis_name="tensor"))(*halves))
    whole = run((new, old, ref, a, mask), forms, **delta)
    for form, (value, metrics, gradient) in whole.items():
        values, parts, gradients = got[form]
        np.testing.assert_allclose(values.sum(), value, rtol=1e-12)
        np.testing.assert_allclose(np.concatenate(gradients, axis=1), gradient, atol=1e-15)
        for name, x in metrics.items():
            of = parts[name].max() if name.endswith("_max") else parts[name].sum()
            np.testing.assert_allclose(of, x, rtol=1e-12, err_msg=name)


def test_an_output_without_tokens_is_none():
    """As the second of those drawn: counted as one, it would make the others' shares smaller."""
    arrays = drawn(8)
    assert not arrays[-1][1].any()
    value = loss(arrays)
    want = oracle(*arrays, "token", "k3", "output")
    np.testing.assert_allclose(value, want, rtol=1e-12)
    assert abs(want * 4 / 5 - want) > 1e-3


def test_importance_weights_are_of_tokens():
    """Outputs of small differences keep their weight: the product over an output would take it from the longest."""
    new, a, mask = np.full((ROWS, T), -1.0), np.ones(ROWS), np.ones((ROWS, T), bool)
    form = ("token", "k3", "output")

    def of(kind, sampler):
        found = run((new, new, new, a, mask), (form,), sampler, importance=kind)[form]
        return -found[0], found[1]["importance"]

    np.testing.assert_allclose(of("truncated", new + 0.1), np.exp(-0.1), rtol=1e-12)
    assert np.exp(-0.1 * T) < 0.5
    far = np.where(np.arange(T) % 2, new - 1, new)  # every other weight is e
    np.testing.assert_allclose(of("truncated", far), 1.5)
    np.testing.assert_allclose(of("masked", far), 0.5)
    np.testing.assert_allclose(-loss((new, new, new, a, mask)), 1)


# --- options ------------------------------------------------------------------------------------------------------


def test_presets_differ_in_few_options():
    for name, changes in PRESETS.items():
        cfg = preset(name, constant_length=32)
        assert {key: getattr(cfg, key) for key in changes} == dict(changes)
    assert preset("v32") == GRPOLossConfig()
    assert preset("dapo", beta=0.5).beta == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": "k2"}, "kl='k2' is not one of"),
        ({"ratio": "sequences"}, "did you mean 'sequence'"),
        ({"aggregate": "constant"}, "needs loss.constant_length"),
        ({"beta": 0.1}, "beta=0.1 weighs a KL divergence: give ref_logp"),
    ],
)
def test_options_that_do_not_fit(options, message):
    one = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: grpo_loss(x, x, None, jnp.ones(1), x == x, **options), one)
    with pytest.raises(ValueError, match=r"needs loss\.constant_length"):
        preset("dr_grpo")

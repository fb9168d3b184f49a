"""Experts that are given to a pass: its own change no bit, others' leave the gate its gradient, layers are not mixed up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model import transformer
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.router import affinities, route
from deepseek_jax.model.transformer import forward
from deepseek_jax.training.labels import check
from tests.oracle.tiny import V3, weights

# A dense layer before two with experts: were layers counted from the first one, the routes would be others'.
CFG = dataclasses.replace(V3, num_nextn_predict_layers=1)
B, T, L, K = 2, 9, CFG.num_moe_layers, CFG.num_experts_per_tok
TOKENS = np.random.default_rng(1).integers(0, CFG.vocab_size, (B, T)).astype(np.int32)
COUNTED = np.arange(T) < np.array([[T], [T - 2]])
PARAMS, BIAS = weights(CFG)


QUICKLY = {"xla_backend_optimization_level": 0}  # compiled in a third of the time


def states(params, routes_btlk, mtp=True):
    inputs = Inputs(TOKENS, counted_bt=COUNTED, routes_btlk=routes_btlk)
    return forward(params, CFG, inputs, BIAS, single_device(), mtp)


STATES = jax.jit(states, compiler_options=QUICKLY)


@functools.partial(jax.jit, compiler_options=QUICKLY)
def gradients(gates, routes_btlk):
    """Of a function of the main model's states, and of its balance loss, by the weights of the gates [l, d, e]."""

    def value(gates):
        moe = PARAMS["moe_layers"]
        ffn = {**moe["ffn"], "gate": {"w_gate_de": gates}}
        h_btd, aux = states({**PARAMS, "moe_layers": {**moe, "ffn": ffn}}, routes_btlk, mtp=False)
        return jnp.sin(h_btd).sum() + aux.seq_loss

    return jax.grad(value)(gates)


def others(seed: int = 3) -> np.ndarray:
    """Any experts, not those of the gate."""
    ids = np.broadcast_to(np.arange(CFG.n_routed_experts), (B, T, L, CFG.n_routed_experts))
    return np.random.default_rng(seed).permuted(ids, axis=-1)[..., :K].astype(np.int16)


def test_own_routes_change_no_bit():
    nothing = np.full((B, T, L, K), -1, np.int16)
    h_btd, aux = STATES(PARAMS, nothing)
    own = np.moveaxis(np.asarray(aux.experts_lbtk), 0, 2).astype(np.int16)
    assert (own[COUNTED] < CFG.n_routed_experts).all() and (own[~COUNTED] == CFG.n_routed_experts).all()
    own[~COUNTED] = -1
    for again in (own, None):  # None: a program without routes
        for x, y in zip(jax.tree.leaves(STATES(PARAMS, again)), jax.tree.leaves((h_btd, aux)), strict=True):
            np.testing.assert_array_equal(x, y)
    gates = PARAMS["moe_layers"]["ffn"]["gate"]["w_gate_de"]
    np.testing.assert_array_equal(gradients(gates, own), gradients(gates, nothing))


def test_others_routes_are_taken_and_leave_the_gate_its_gradient():
    routes = others()
    _, aux = STATES(PARAMS, routes)
    np.testing.assert_array_equal(np.moveaxis(aux.experts_lbtk, 0, 2)[COUNTED], routes[COUNTED])
    grads = gradients(PARAMS["moe_layers"]["ffn"]["gate"]["w_gate_de"], routes)
    assert (np.abs(grads).max((1, 2)) > 1e-3).all()


def check_gating_values(route):
    """By hand, with their gradient by the affinities: f s_i / S of the given ones, S their sum; the bias has no part."""
    rng = np.random.default_rng(0)
    x, w = (
        rng.standard_normal(s).astype(np.float32) for s in ((1, 4, CFG.hidden_size), (CFG.hidden_size, 12))
    )
    s_bte = affinities({"w_gate_de": w}, CFG, x)
    given = np.array([[[0, 5, 7], [3, 2, 1], [11, 0, 4], [-1, -1, -1]]])
    bias, worth = 100 * rng.standard_normal(12).astype(np.float32), np.float32([1, -2, 5])

    def value(s_bte):
        got = route(CFG, s_bte, bias, given)
        return (got.weights_btk @ worth).sum(), got

    ds_bte, got = jax.grad(value, has_aux=True)(s_bte)
    s, f = 1 / (1 + np.exp(-(np.float64(x[0]) @ np.float64(w)))), CFG.routed_scaling_factor
    for t, ids in enumerate(given[0][:3]):
        np.testing.assert_array_equal(got.experts_btk[0, t], ids)
        chosen = s[t, ids]
        total, want = chosen.sum(), np.zeros(12)
        np.testing.assert_allclose(got.weights_btk[0, t], f * chosen / total, rtol=1e-5)
        want[ids] = f * (worth / total - (worth * chosen).sum() / total**2)
        np.testing.assert_allclose(ds_bte[0, t], want, rtol=1e-4, atol=1e-5)
    assert (np.asarray(got.experts_btk[0, 3]) >= 0).all()  # where none are given, the router chooses


def detached(cfg, s_bte, bias_e, given_btk=None):
    """As if weights were recorded with the experts."""
    return route(cfg, jax.lax.stop_gradient(s_bte), bias_e, given_btk)


def unheard(cfg, s_bte, bias_e, given_btk=None):
    return route(cfg, s_bte, bias_e)


def test_gating_values_of_given_experts():
    check_gating_values(route)
    for mutant in (detached, unheard):
        with pytest.raises(AssertionError):
            check_gating_values(mutant)


def check_layers(states):
    """A layer's own: expert 2 l, 2 l + 1, 2 l + 2 in layer l of those that have experts, and nothing of it in the MTP module."""
    routes = np.broadcast_to(2 * np.arange(L)[:, None] + np.arange(K)[None], (B, T, L, K))
    aux = states(PARAMS, routes.astype(np.int16))[1]
    want = np.zeros((L, CFG.n_routed_experts), int)
    for layer in range(L):
        want[layer, 2 * layer : 2 * layer + K] = COUNTED.sum()
    np.testing.assert_array_equal(aux.expert_counts_le[:L], want)
    assert (np.asarray(aux.expert_counts_le[L]) > 0).sum() > K


def test_layers_are_those_with_experts(monkeypatch):
    check_layers(STATES)
    own = transformer._routes
    monkeypatch.setattr(
        transformer, "_routes", lambda *args: jnp.roll(own(*args), 1, axis=0)
    )  # counted from a dense one
    with pytest.raises(AssertionError):
        check_layers(jax.jit(lambda *args: states(*args), compiler_options=QUICKLY))


@pytest.mark.parametrize("layers", [CFG.num_hidden_layers, L + CFG.num_nextn_predict_layers, 1])
def test_routes_of_other_layers_are_refused(layers):
    routes = np.zeros((B, T, layers, K), np.int32)
    with pytest.raises(
        ValueError, match=rf"routes have shape \[2, 9, {layers}, 3\]; for these tokens it is \[2, 9, 2, 3\]"
    ):
        states(PARAMS, routes)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 10, 3), np.int32), np.zeros((2, 9, 2, 3), np.int32), np.zeros((2, 10, 2, 3))]
)
def test_a_batch_whose_routes_do_not_fit(bad):
    batch = {"tokens": np.zeros((2, 10), np.int32)}
    check(batch | {"routes": np.zeros((2, 10, 2, 3), np.int16)}, 9)
    with pytest.raises(
        ValueError, match=r'batch\["routes"\] is .* it should be integers \[2, 10, MoE layers'
    ):
        check(batch | {"routes": bad}, 9)

"""The shared expert as one more routed expert, with copies on several of eight devices (report section 3.4.2): the function of
the shared expert that lies whole on each.

Dims: b sequence, t token, d hidden, e expert, p slot.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.balancing.eplb import rebalance_experts
from deepseek_jax.balancing.plan import Plan
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.layout import Context, Layout, single_device
from deepseek_jax.model.moe import moe, moe_params, with_shared
from deepseek_jax.model.params import initialise
from deepseek_jax.model.router import Routing
from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.low_latency import LowLatency
from deepseek_jax.parallel.exchange.placement import Placement
from tests.parallel.comparison import BOUND, difference
from tests.parallel.harness import on_mesh
from tests.tiny_run import tiny

CFG = tiny(model={"n_routed_experts": 8, "num_experts_per_tok": 3}).model
SHAPE, B, T = (2, 4), 8, 5
COUNTED = np.random.default_rng(3).random((B, T)) < 0.7


def layer():
    """A layer's parameters, and a stream of tokens."""
    tree = {"ffn": moe_params(CFG)}
    p = initialise(jax.random.key(0), tree, 0.3)
    p["ffn_norm_d"] = jnp.ones(CFG.hidden_size)
    return p, jax.random.normal(jax.random.key(1), (B, T, CFG.hidden_size))


def plan() -> Plan:
    """16 slots for 9 experts, by load: every token goes to the last, three of eight to the others."""
    load_le = np.full((1, 9), T * 3 / 8)
    load_le[0, 8] = T
    return Plan(np.asarray(rebalance_experts(load_le, 16, 1, 1, 8)[0], np.int32)).checked(9, 16)


def in_slots(p):
    """The same layer with the shared expert among the routed ones, in the slots of the plan."""
    made = plan()
    ffn = dict(p["ffn"])
    shared = ffn.pop("shared")
    of_shared = [shared[name.replace("edf", "df").replace("efd", "fd")] for name in ffn["experts"]]
    both = (
        jnp.concatenate([x, one[None]]) for x, one in zip(ffn["experts"].values(), of_shared, strict=True)
    )
    experts = {name: x[made.physical_lp[0]] for name, x in zip(ffn["experts"], both, strict=True)}
    placement = Placement(jnp.maximum(made.copies()[0], 0), jnp.asarray(made.logcnt[0]))
    return p | {"ffn": ffn | {"experts": experts, "placement": placement}}


def apply(p, x_btd, counted_bt, layout):
    return moe(p, CFG, x_btd, None, Context(None, layout, counted_bt=counted_bt))[0]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def computed():
    """(apart on one device; by either exchange over eight), tokens that do not count included."""
    p, x_btd = layer()
    want = jax.jit(lambda: apply(p, x_btd, COUNTED, single_device()))()
    axes = (("node", SHAPE[0]), ("local", SHAPE[1]))
    layouts = {
        "few tokens": Layout(LowLatency(), mesh=axes),
        "many tokens": Layout(Ragged(function=routed_experts), mesh=axes),
    }
    slots = in_slots(p)
    experts = slots["ffn"].pop("experts")

    def run(experts, x_btd, counted_bt):
        here = slots | {"ffn": slots["ffn"] | {"experts": experts}}
        return {name: apply(here, x_btd, counted_bt, layout) for name, layout in layouts.items()}

    return want, on_mesh(run, SHAPE, 3)(experts, x_btd, COUNTED), x_btd


@pytest.mark.parametrize("exchange", ["few tokens", "many tokens"])
def test_it_is_the_function_of_the_expert_apart(computed, exchange):
    """Of tokens that count; of others, of whom nothing is wanted, the routed form leaves the shared expert out, too."""
    want, got, x_btd = computed
    assert difference(got[exchange][COUNTED], want[COUNTED]) < BOUND
    np.testing.assert_array_equal(got[exchange][~COUNTED], x_btd[~COUNTED])


def test_by_load_the_shared_expert_has_most_copies():
    """It has 8/3 of the load of each of eight others: three copies have 8/9 each, and then whole ones of 1 are divided."""
    [counts] = plan().logcnt
    assert counts.sum() == 16 and counts[8] == counts.max() == 3


def test_absent_experts_stay_absent():
    """An id beyond the gate's experts must not be read as the shared one, whose id it is."""
    routing = Routing(jnp.array([[[3, 0, 7], [8, 8, 8]]]), jnp.full((1, 2, 3), 0.5))
    to = with_shared(CFG, routing)
    np.testing.assert_array_equal(to.experts_btk, [[[3, 0, 7, 8], [-1, -1, -1, -1]]])
    np.testing.assert_array_equal(to.weights_btk, [[[0.5, 0.5, 0.5, 1.0]] * 2])

"""Experts of stacked layers, as a deep model on GPUs has them, in the slots of one plan after the other.

Dims: l layer, e expert, p slot.
"""

import dataclasses

import jax
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel import prepared, slots
from deepseek_jax.parallel.slots import Slots
from tests.tiny_run import tiny

CFG = dataclasses.replace(
    tiny().model, num_hidden_layers=3, first_k_dense_replace=1, num_nextn_predict_layers=0
)
MESH = MeshConfig(data=1, node=2, local=2, tensor=2)
RNG = np.random.default_rng(0)
EXPERTS_LE = {
    "w_down_efd": RNG.standard_normal((2, 8, 3, 2)).astype(np.float32),
    "scale": RNG.integers(0, 255, (2, 8, 4), np.uint8).view(jax.numpy.float8_e4m3fn),
}


def plan_of_layer():
    return RNG.permutation(np.concatenate([np.arange(8), RNG.integers(0, 8, 8)])).astype(np.int32)


def check(ready, plan):
    """Each slot has its expert, and the placement says so."""
    ffn = ready["moe_layers"]["ffn"]
    for name, x in EXPERTS_LE.items():
        for layer, physical_p in enumerate(plan.physical_lp):
            got = np.asarray(ffn["experts"][name])[layer]
            np.testing.assert_array_equal(got.view(np.uint8), x[layer, physical_p].view(np.uint8))
    physical, count = map(np.asarray, ffn["placement"])
    for layer, physical_p in enumerate(plan.physical_lp):
        for e in range(8):
            there = np.flatnonzero(physical_p == e).tolist()
            assert sorted(physical[layer, e, : count[layer, e]].tolist()) == there


def test_slots_hold_what_plans_say(monkeypatch):
    """Filled once; then one layer moves, and the other stays as it was. What is no expert is shared."""
    monkeypatch.setattr(slots, "unrolled", lambda cfg: False)
    made = Slots(CFG, MESH, redundant=8)
    gate = np.ones(3)
    spec = jax.NamedSharding(made.devices, jax.P(None, ("node", "local", "tensor")))
    experts = jax.device_put(EXPERTS_LE, spec)
    ready = {"moe_layers": {"ffn": {"gate": gate, "experts": experts}}, "embed": gate}
    taken = slots.bytes_in_slots(ready, CFG, 8)
    ready = made.filled(ready)
    check(ready, made.plan)
    there = jax.tree.leaves(ready["moe_layers"]["ffn"]["experts"])
    assert taken == sum(x.addressable_shards[0].data.nbytes for x in there) == 2 * 2 * (3 * 2 * 4 + 4)
    for layer in (1, 0, 1):
        new_p = plan_of_layer()
        ready = made.moved(ready, layer, new_p)
        np.testing.assert_array_equal(made.plan.physical_lp[layer], new_p)
        check(ready, made.plan)
    assert ready["embed"] is gate and ready["moe_layers"]["ffn"]["gate"] is gate
    spec = prepared.ready_specs(CFG, prepared.parameter_specs(CFG, MESH, made.devices), placed=True)
    assert {"experts", "placement"} <= spec["moe_layers"][0]["ffn"].keys()


@pytest.mark.parametrize(
    "mesh, redundant, says",
    [
        (
            MESH,
            3,
            r"8 experts and redundant=3 more do not divide over 8 devices of node x local x tensor: give 0",
        ),
        (
            MeshConfig(data=8),
            8,
            r"redundant=8: there is no device without the experts of another: give a mesh",
        ),
        (MeshConfig(data=1, node=8, experts="replicated"), 0, r"redundant=0: there is no device"),
    ],
)
def test_what_cannot_be(mesh, redundant, says):
    with pytest.raises(ValueError, match=says):
        Slots(CFG, mesh, redundant)

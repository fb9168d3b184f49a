"""Experts that a checkpoint does not have as many of as devices could share: they are read into slots, the shared one among them.

Dims: l layer, e expert, p slot.
"""

import dataclasses

import jax
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax import hf
from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel.slots import InSlots
from deepseek_jax.serving.build import cold
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.transfer.identity import fingerprint
from tests.oracle.tiny import weights
from tests.serving import mesh_engine
from tests.serving.mesh_engine import CFG, OPTIONS, alone

MESH = MeshConfig(data=1, node=2, local=3)  # 8 experts do not divide over 6 devices, nor do 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    hf.save(path, CFG, *weights(CFG, seed=4), format="f32")
    return path


@pytest.mark.parametrize("format", ["f32", "fp8"])
@pytest.mark.parametrize("shared", [False, True])
def test_slots_hold_what_the_checkpoint_has(format, shared, tmp_path):
    params, bias = weights(CFG, seed=4)
    hf.save(tmp_path, CFG, params, bias, format=format)
    fp8 = format == "fp8"
    want = deepseek_jax.load(tmp_path, keep_fp8=fp8)
    got = deepseek_jax.load(tmp_path, keep_fp8=fp8, mesh=MESH, slots=InSlots(4 - shared, shared))
    assert got.plan.physical_lp.shape == (CFG.num_moe_layers + 1, 12)
    assert got.plan.experts == 8 + shared and got.plan.redundant == 4 - shared
    for name, layers in (("moe_layers", slice(0, CFG.num_moe_layers)), ("mtp", slice(-1, None))):
        here, there = (
            tree[name] if name == "moe_layers" else tree[name]["block"] for tree in (got.params, want.params)
        )
        assert ("shared" in here["ffn"]) != shared
        for key, x in there["ffn"]["experts"].items():
            one = there["ffn"]["shared"][key.replace("edf", "df").replace("efd", "fd")]
            for a, b, c in zip(*map(jax.tree.leaves, (here["ffn"]["experts"][key], x, one)), strict=True):
                both_le = np.concatenate([np.asarray(b), np.asarray(c)[:, None]], 1)
                for layer, physical_p in enumerate(got.plan.physical_lp[layers]):
                    np.testing.assert_array_equal(
                        np.asarray(a)[layer].view(np.uint8), both_le[layer, physical_p].view(np.uint8)
                    )
    assert fingerprint(got.params, got.plan) == fingerprint(want.params)


def test_an_engine_with_the_shared_expert_among_the_routed_ones(folder):
    """The tokens of one device, in whatever slots the experts lie and while they move; plans look at the shared one's load, too."""
    rng, moved = np.random.default_rng(0), []
    requests = [Request(str(i), rng.integers(0, CFG.vocab_size, 40).tolist(), 8) for i in range(6)]
    model = deepseek_jax.load(folder, mesh=MESH, slots=InSlots(3, True))
    made = Engine(cold(model, dataclasses.replace(OPTIONS, redundant=3, pages=8)), OPTIONS)
    assert made.experts.planner.window.count_le.shape == (CFG.num_moe_layers + 1, 9)

    def turn(step=made.step):
        if len(moved) < 6:
            layer = len(moved) % made.device.slots.layers
            more = rng.integers(0, 9, 3)
            moved.append(rng.permutation(np.concatenate([np.arange(9), more])).astype(np.int32))
            made.device.move(layer, moved[-1])
        return step()

    made.experts, made.step = None, turn
    got = {name: [token.id for token in row] for name, row in mesh_engine.tokens(made, requests).items()}
    assert got == alone(requests) and len(moved) == 6
    loads_le = np.asarray(made.device.loads())
    assert loads_le.shape == (CFG.num_moe_layers + 1, 8) and loads_le[0].sum() > 0


def test_several_shared_experts_stay_apart(tmp_path):
    cfg = dataclasses.replace(CFG, n_shared_experts=2)
    hf.save(tmp_path, cfg, *weights(cfg, seed=4), format="f32")
    with pytest.raises(ValueError, match="shared_routed: the model has 2 shared experts"):
        deepseek_jax.load(tmp_path, mesh=MESH, slots=InSlots(3, True))


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"slots": InSlots(2)}, "redundant=2.*: experts are spread over the devices of a mesh"),
        ({"mesh": MESH, "slots": InSlots(3)}, "8 experts and redundant=3 more do not divide over 6 devices"),
    ],
)
def test_what_cannot_be_loaded(asked, says, folder):
    with pytest.raises(ValueError, match=says):
        deepseek_jax.load(folder, **asked)

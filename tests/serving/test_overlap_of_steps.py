"""When an engine over a mesh runs its rows in two halves."""

import dataclasses

import pytest

from configs import v3_671b
from deepseek_jax.config import MeshConfig, from_config_dict
from deepseek_jax.parallel.exchange.dispatcher import AS_IT_IS
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.precision import preset
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.over_mesh import layout_of
from deepseek_jax.serving.overlap import overlap_from, pays_from

V3 = dataclasses.replace(from_config_dict(v3_671b.get_config()).model, dtype="bfloat16")
FP8 = preset("deepseek_fp8")


@pytest.mark.parametrize(("nodes", "experts", "tokens"), [(18, 288, 12), (8, 256, 30), (1, 256, 506)])
def test_from_how_many_tokens_on_it_pays(nodes, experts, tokens):
    """A layer's weights in FP8: 187.1 M of the attention, 44.04 M of the shared and of each routed expert, and the gate in BF16,
    at 2.8 TB/s; a row of 7,456 and 14,336 bytes to each other node at 40 GB/s, and of 8 experts inside at 150 GB/s."""
    model, mesh = dataclasses.replace(V3, n_routed_experts=experts), MeshConfig(data=1, node=nodes, local=8)
    held = 187.107e6 + 44.04e6 * (1 + experts // (8 * nodes)) + 2 * 7168 * experts
    row = 7168 * (1 + 1 / 32) + 64 + 14336
    want = held / 2.8e12 / (row * ((nodes - 1) / 40e9 + 8 / 150e9))
    assert tokens - 1 < want <= tokens == pays_from(model, mesh, FP8)
    assert overlap_from("auto", model, mesh, FP8) is None  # on a CPU
    assert overlap_from("off", model, mesh, FP8) is None and overlap_from(64, model, mesh, FP8) == 64


def test_each_size_has_one_form():
    """From so many tokens on, of sizes with halves, and where tokens travel."""
    mesh = MeshConfig(data=1, node=4, local=2, tensor=4)
    devices = abstract_mesh(mesh, 32)

    def in_two(*program, overlap=64, mesh=mesh, devices=devices):
        return layout_of(program, V3, mesh, devices, AS_IT_IS, overlap).in_two is not None

    assert [in_two("decode", rows) for rows in (1, 32, 63, 64, 128)] == [False, False, False, True, True]
    assert [in_two("drafts", rows) for rows in (31, 32)] == [False, True]
    assert [in_two("prefill", 1, t) for t in (16, 64, 256, 2048)] == [False, True, True, True]
    assert not in_two("prefill", 1, 68) and in_two(
        "prefill", 2, 68
    )  # four devices would share 34 tokens of each half
    assert not in_two("decode", 1, overlap=1) and not in_two("decode", 128, overlap=None)
    replicated = dataclasses.replace(mesh, experts="replicated")
    assert not in_two("decode", 128, mesh=replicated)


def test_options():
    for bad in ("on", 0, 0.5, None, -3):
        with pytest.raises(ValueError, match=r"overlap=.* must be 'off', 'auto' or an integer >= 1"):
            Options(overlap=bad)
    assert Options(overlap=64).overlap == 64 and Options(overlap="auto").overlap == "auto"

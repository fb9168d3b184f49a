"""The mesh: shapes, what does not fit, and how a batch is laid out on it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import MeshConfig
from deepseek_jax.model.params import Param
from deepseek_jax.parallel.mesh import (
    AXES,
    EXPERT_PARALLEL,
    TENSOR_PARALLEL,
    batch_sharding,
    batch_shards,
    expert_exchange,
    make_mesh,
    param_specs,
    replicated,
    rules,
    spec_axes,
)


def shape(cfg, devices):
    return tuple(make_mesh(cfg, devices).shape.values())


def test_axes_and_their_sizes():
    devices = jax.devices()[:2]
    mesh = make_mesh(MeshConfig(), devices)
    assert mesh.axis_names == AXES == ("pipe", "data", "node", "local", "tensor")
    assert tuple(mesh.shape.values()) == (1, 2, 1, 1, 1)
    assert shape(MeshConfig(local=2), devices) == (1, 1, 1, 2, 1)
    assert shape(MeshConfig(pipe=2), devices) == (2, 1, 1, 1, 1)
    assert shape(MeshConfig(data=1), devices) == (1, 1, 1, 1, 1)  # a part of the devices, if asked for


@pytest.mark.parametrize(
    ("cfg", "need"),
    [
        (MeshConfig(data=3), 3),
        (MeshConfig(node=2, local=2), 4),
        (MeshConfig(tensor=3), 3),
        (MeshConfig(pipe=2, data=2), 4),
    ],
)
def test_axes_that_do_not_fit(cfg, need):
    with pytest.raises(ValueError, match=rf"needs {need} devices and 2 are at hand; change config.mesh"):
        make_mesh(cfg, jax.devices()[:2])


def test_batch_is_split_over_data_node_and_local():
    devices = jax.devices()[:2]
    mesh = make_mesh(MeshConfig(local=2), devices)
    assert batch_shards(mesh) == 2
    assert batch_shards(make_mesh(MeshConfig(tensor=2), devices)) == 1
    x = jax.device_put(np.arange(8).reshape(4, 2), batch_sharding(mesh))
    assert [shard.data.tolist() for shard in x.addressable_shards] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    y = jax.device_put(np.arange(4), replicated(mesh))
    assert [shard.data.tolist() for shard in y.addressable_shards] == [[0, 1, 2, 3]] * 2


# --- rules ------------------------------------------------------------------------------------------------------

TREE = {
    "experts": {"w_edf": Param((8, 6, 4), ("expert", "embed", "expert_mlp"))},
    "stack": {"w_led": Param((3, 8, 6), ("layer", "expert", "embed"))},
    "gate": {"w_de": Param((6, 8), ("embed", None))},
}


def test_the_table_gives_every_parameter_its_mesh_axes():
    mesh = make_mesh(MeshConfig(data=1, node=2, local=4))
    specs = param_specs(TREE, mesh, EXPERT_PARALLEL)
    both = ("node", "local")
    assert specs == {
        "experts": {"w_edf": P(both)},
        "stack": {"w_led": P(None, both)},
        "gate": {"w_de": P()},
    }
    assert spec_axes(specs["stack"]["w_led"]) == both and spec_axes(P()) == ()
    flat = param_specs(TREE, make_mesh(MeshConfig(data=2, node=4)), EXPERT_PARALLEL)
    assert flat["experts"]["w_edf"] == P(("node",))  # an axis of one device shards nothing
    assert all(spec == P() for spec in jax.tree.leaves(param_specs(TREE, mesh, TENSOR_PARALLEL)))


def test_two_dims_on_one_mesh_axis_are_refused():
    mesh = make_mesh(MeshConfig(data=1, node=2, local=4))
    table = EXPERT_PARALLEL | {"embed": ("local",)}
    with pytest.raises(
        ValueError,
        match=r"experts.w_edf \(8, 6, 4\): its axes 'expert' and 'embed' are both mapped to the mesh axis 'local'",
    ):
        param_specs({"experts": TREE["experts"]}, mesh, table)


def test_sizes_that_do_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(data=1, local=6), jax.devices()[:6])
    with pytest.raises(
        ValueError, match=r"experts.w_edf \(8, 6, 4\): 8 of 'expert' do not divide over 6 devices of local=6"
    ):
        param_specs(TREE, mesh, EXPERT_PARALLEL)


@pytest.mark.parametrize(
    ("cfg", "exchange"),
    [
        (MeshConfig(data=8), "replicated"),
        (MeshConfig(data=8, experts="flat"), "replicated"),
        (MeshConfig(local=8), "flat"),
        (MeshConfig(node=2), "flat"),
        (MeshConfig(node=2, local=2), "two_hop"),
        (MeshConfig(node=2, local=4, experts="flat"), "flat"),
        (MeshConfig(node=2, local=4, experts="replicated"), "replicated"),
    ],
)
def test_how_experts_are_exchanged_by_default(cfg, exchange):
    mesh = make_mesh(cfg)
    assert expert_exchange(cfg, mesh) == exchange
    assert rules(cfg, mesh) == (TENSOR_PARALLEL if exchange == "replicated" else EXPERT_PARALLEL)

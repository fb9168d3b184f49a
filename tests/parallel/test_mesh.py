"""The mesh: shapes, what does not fit, and how a batch is laid out on it."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel.mesh import AXES, batch_sharding, batch_shards, make_mesh, replicated


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

"""Loading onto devices with memory of their own: the same arrays, and no more than a layer of a leaf on the host."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax import hf
from deepseek_jax.config import MeshConfig
from deepseek_jax.hf import arrays, convert
from deepseek_jax.parallel.prepared import parameter_shardings
from tests.oracle.tiny import V3, weights

LAYERS, EXPERTS, HIDDEN, INNER = 12, 16, 256, 128
CFG = dataclasses.replace(
    V3,
    num_hidden_layers=1 + LAYERS,
    first_k_dense_replace=1,
    hidden_size=HIDDEN,
    moe_intermediate_size=INNER,
    n_routed_experts=EXPERTS,
    num_nextn_predict_layers=0,
)
MESH = MeshConfig(data=1, local=2)
PIECE = 2 * HIDDEN * INNER  # bytes of one expert's matrix in BF16
LAYER = PIECE * EXPERTS // MESH.local  # of a device's part of one layer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("many_layers")
    hf.save(path / "folder", CFG, *weights(CFG), format="fp8")
    convert.to_orbax(path / "folder", path / "run")
    return path


@pytest.fixture
def temporary(monkeypatch):
    """Bytes that each leaf took on the host while it was read, at most; devices have memory of their own."""
    peaks, filled = [], arrays.filled

    def measured(*args):
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        out = filled(*args)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
        return out

    monkeypatch.setattr(arrays, "in_host_memory", lambda device: False)
    monkeypatch.setattr(arrays, "filled", measured)
    yield peaks
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["folder", "run"])
def test_the_host_holds_one_layer(kind, folders, temporary):
    """One device's part of it; of all layers it is twelve times as much. Besides, a few matrices in the forms, some of 4
    bytes, that they have while they are read."""
    deepseek_jax.load(folders / kind, mesh=MESH)  # what is compiled is in memory, too
    tracemalloc.start()
    temporary.clear()
    got = deepseek_jax.load(folders / kind, mesh=MESH)
    tracemalloc.stop()
    assert LAYER < max(temporary) < LAYER + 24 * PIECE < LAYERS / 2 * LAYER
    assert len(temporary) == len(jax.tree.leaves(got.params))
    whole, shardings = hf.load(folders / "folder")[1], parameter_shardings(got.config, MESH)
    for x, y, sharding in zip(*map(jax.tree.leaves, (got.params, whole, shardings)), strict=True):
        assert x.sharding == sharding and x.dtype == y.dtype
        np.testing.assert_array_equal(x.view("uint16"), y.view("uint16"))


def test_what_many_devices_hold_is_read_once():
    """On CPU they share its memory, which no device may write, given up or not."""
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=axes, devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    want, reads = np.arange(24, dtype=np.float32).reshape(6, 4), []

    def fill(where, out):
        reads.append(where)
        out[...] = want[where]

    x = arrays.filled((6, 4), np.dtype(np.float32), sharding, fill, stacked=True)
    assert reads == [(slice(0, 6), slice(0, 2)), (slice(0, 6), slice(2, 4))]
    np.testing.assert_array_equal(x, want)
    x = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, want[shard.index] + 1)

"""Rows between peers: the reference against loops, the kernel's copies in the interpreter, its program for eight H100s.

The interpreter knows neither peers' memory nor semaphores. There, the devices are the thread blocks of a cluster, which share
one memory: what is read, when a slot is filled again, and who writes where are those of the kernel; that it waits for its
peers is not interpreted, but read in what is compiled.
"""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import JAX_VERSION, compiler_params
from pallas_kernels.peer_exchange import kernel, ops
from pallas_kernels.testing.aot import ROOT, mosaic_dump, why_unavailable
from tests.kernels.interpreter import interpret_mode, races_found

N, W, M = 5, 8, 4
P = jax.sharding.PartitionSpec("peer")


def problem(p, seed=0):
    """(x [p, N, W], rows [p, p, M], counts [p, p]) of p devices: one sends nothing, one all that it may, to each."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2**32, (p, N, W), np.uint32)
    counts = rng.integers(0, M + 1, (p, p)).astype(np.int32)
    counts[0], counts[-1] = 0, M
    return x, rng.integers(0, N, (p, p, M)).astype(np.int32), counts


def assert_exchanged(out, received, x, rows, counts):
    np.testing.assert_array_equal(received, counts.T)
    for source in range(len(x)):
        for target in range(len(x)):
            there = slice(counts[source, target])
            np.testing.assert_array_equal(out[target, source, there], x[source, rows[source, target, there]])


def flat(arrays):
    return [a.reshape(-1, *a.shape[2:]) for a in arrays]


def test_reference():
    mesh = jax.make_mesh((4,), ("peer",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    exchange = functools.partial(ops.peer_exchange, axis="peer")
    run = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=P, out_specs=P, check_vma=False))
    arrays = problem(4)
    out, received = (np.asarray(a).reshape(4, 4, *a.shape[1:]) for a in run(*flat(arrays)))
    assert_exchanged(out, received, *arrays)
    with pytest.raises(
        ValueError, match=r"counts int32\[3\] over 4 devices of \('peer',\); expected .* int32\[4\]"
    ):
        jax.eval_shape(
            jax.shard_map(lambda *a: exchange(*a[:2], a[2][:3]), mesh=mesh, in_specs=P, out_specs=P),
            *flat(arrays),
        )


class InACluster(kernel.Peers):
    """Devices as thread blocks of a cluster. Arrays have a leading dim of devices."""

    def me(self):
        return lax.axis_index("peer")

    def mine(self, ref):
        return ref.at[self.me()]

    def of(self, ref, peer):
        return ref.at[peer]

    def semaphore(self):
        return None

    def say(self, arrived, peer):
        pass

    def hear(self, arrived, times):
        pass


@pytest.mark.skipif(JAX_VERSION < (0, 12), reason="addresses in other devices' memory come with jax 0.12")
def test_copies_in_the_interpreter(monkeypatch):
    """Two rows of each thread block fit its shared memory, so that slots are filled again."""
    monkeypatch.setattr(kernel, "CHANNELS", 1)
    p, stages = 2, 2
    x, rows, counts = problem(p)
    shapes = jax.ShapeDtypeStruct((p, p, M, W), jnp.uint32), jax.ShapeDtypeStruct((p, p), jnp.int32)
    with interpret_mode():
        out, received = plgpu.kernel(
            functools.partial(kernel.exchange, InACluster(("peer",))),
            out_type=shapes,
            grid=(p,),
            grid_names=("block",),
            cluster=(p,),
            cluster_names=("peer",),
            scratch_types=[plgpu.SMEM((stages, W), jnp.uint32), plgpu.Barrier(num_barriers=stages)],
            compiler_params=compiler_params(),
        )(x, rows, counts)
    assert not races_found()
    assert_exchanged(np.asarray(out), np.asarray(received), x, rows, counts)


@pytest.mark.skipif(JAX_VERSION < (0, 12), reason="addresses in other devices' memory come with jax 0.12")
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_compiled_for_eight_h100s(tmp_path):
    """Rows go by TMA, from memory and to the peer's; all thread blocks of a device share one semaphore, which is signalled to
    the system and waited for once, at what eight times four of them add up to."""
    environment = os.environ | mosaic_dump(str(tmp_path)) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.exchange_for_h100", str(tmp_path)]
    done = subprocess.run(
        command,
        env=environment | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("spill bytes") == 0
    assert found == {
        "semaphores": 1,
        "peers": "0,1,2,3,4,5,6,7",
        "to shared memory": kernel.STAGES,  # the first ones, and that of the loop
        "to a peer": 1,
        "signals": 1,
        "added up to": 8 * kernel.CHANNELS,
    }

"""Two processes hold one half each of sharded arrays: average, checkpoint, common decisions; then restored elsewhere."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.training.checkpoint import Checkpointer
from experiments.launch import Group
from tests.parallel.processes import LIMIT, devices

WORKER = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from deepseek_jax.config import DistributedConfig, MeshConfig
from deepseek_jax.parallel.processes import joining
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.processes.together import StopVote, batch_share, from_first, on_host, whole_copy
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.ema import EMA, abstract_average

cfg = DistributedConfig(heartbeat_timeout=10)
join = joining.find(cfg, os.environ)
if join is not None:
    joining.start(join, cfg)
rank, mesh = jax.process_index(), make_mesh(MeshConfig(data=2, node=2, local=2) if join else MeshConfig())
experts, everywhere = NamedSharding(mesh, P(("data", "node", "local"))), NamedSharding(mesh, P())
host = {"experts": np.arange(48.0, dtype=np.float32).reshape(8, 6), "norm": np.ones(5, np.float32)}
shardings = {"experts": experts, "norm": everywhere}
put = lambda scale: jax.tree.map(
    lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: scale * x[i]), host, shardings)
params = put(1.0)
ema = EMA(params, 0.5)
checkpointer = Checkpointer(sys.argv[1])
meta = {"config": {}, "data": {}, "tokens": 5}
if join is not None:
    assert batch_share(mesh) == (rank, 2)
    for name, x in whole_copy(params, mesh).items():
        assert x.devices() == {jax.local_devices()[0]}
        np.testing.assert_array_equal(x, host[name])
    assert from_first(10 + rank) == 10
    np.testing.assert_array_equal(on_host(params["experts"]), host["experts"])
    vote = StopVote(mesh)
    # process 1 alone wishes, in its second call; both know in the third
    assert [vote(rank == 1 and call == 1) for call in range(4)] == [False, False, True, False]
    ema.update(put(2.0)), ema.update(put(5.0))
    want = (0.5 * 2 + 5) / 1.5
    kept = ema.value()
    assert isinstance(kept["norm"], np.ndarray) and kept["experts"].sharding == experts
    checkpointer.save(3, params, ema.state(), meta)
    checkpointer.wait()
restored = checkpointer.restore(params, ema=abstract_average(params))
fresh = EMA(restored.ema["params"], 0.5, restored.ema["updates"])
averaged = fresh.on_devices(params)
for name, x in host.items():
    for got, factor in ((restored.state[name], 1.0), (averaged[name], 4.0)):
        assert got.sharding == shardings[name]
        for shard in got.addressable_shards:
            np.testing.assert_allclose(shard.data, factor * x[shard.index], rtol=1e-6)
fresh.update(put(1.0))  # goes on
fresh.close(), ema.close(), checkpointer.close()
joining.stop()
print("well", len(jax.devices()), flush=True)
"""


def test_sharded_over_two_processes_and_back(tmp_path, capsys, monkeypatch):
    for name, value in devices(4).items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", WORKER, str(tmp_path / "saved")]
    group = Group(command, 2)
    group.wait(LIMIT)
    ended = not group.running() and group.failed() is None
    group.close()
    printed = capsys.readouterr().out
    assert ended, printed
    assert "[0] well 8" in printed and "[1] well 8" in printed
    # on four devices of one process, another sharding
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "well 4" in done.stdout
    # on one device
    like = {
        "experts": jax.ShapeDtypeStruct((8, 6), jnp.float32),
        "norm": jax.ShapeDtypeStruct((5,), jnp.float32),
    }
    checkpointer = Checkpointer(tmp_path / "saved")
    restored = checkpointer.restore(like)
    checkpointer.close()
    assert restored.step == 3 and int(restored.ema["updates"]) == 2
    np.testing.assert_array_equal(restored.state["experts"], np.arange(48.0).reshape(8, 6))
    np.testing.assert_allclose(
        restored.ema["params"]["experts"], 4 * np.arange(48.0).reshape(8, 6), rtol=1e-6
    )

"""Compile the exchange over peers' memory for eight H100s: what its program and PTX say, as one JSON line.

python -m tests.kernels.exchange_for_h100 DUMP, with the environment of `mosaic_dump(DUMP)`
"""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from deepseek_jax.parallel.exchange.dispatcher import INSIDE
from pallas_kernels.peer_exchange.ops import peer_exchange
from pallas_kernels.testing.aot import TARGET

TOKENS = 128
WORDS = (
    7168 + 4 * 56 + 4 * 8 + 4 * 8
) // 4  # an FP8 row of DeepSeek-V3 with scales, routing weights and expert ids


def main() -> None:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x8"
    )
    axes = ("node", *INSIDE)
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1, 8, 1), axis_names=axes)
    over = PartitionSpec(axes)

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((8 * shape[0], *shape[1:]), dtype, sharding=NamedSharding(mesh, over))

    def run(x, rows, counts):
        return peer_exchange(x, rows, counts, INSIDE)

    with use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=over, out_specs=over, check_vma=False))
        shapes = array(TOKENS, WORDS, dtype=jnp.uint32), array(8, TOKENS), array(8)
        text = program.lower(*shapes).compile().as_text()
    [ptx] = (path.read_text() for path in pathlib.Path(sys.argv[1]).glob("*.ptx"))
    [log] = (path.read_text() for path in pathlib.Path(sys.argv[1]).glob("*.ptxas"))
    [(semaphores, peers)] = re.findall(
        r"s32\[8\]\{0\}, s32\[(\d+)\]\{0\}\) custom-call\(.*uses_xla_collective_metadata = true.*"
        r'xla_replica_ids = "([\d,]*)"',
        text,
    )
    [waits] = re.findall(r"atom\.relaxed\.sys\.global\.cas\.b32 \S+ \[(%\w+)\], (%\w+)", ptx)
    [total] = set(re.findall(rf"mov\.b32\s+{waits[1]}, (\d+);", ptx))
    found = {
        "semaphores": int(semaphores),
        "peers": peers,
        "to shared memory": ptx.count("cp.async.bulk.shared::cta.global.mbarrier"),
        "to a peer": ptx.count("cp.async.bulk.global.shared::cta.bulk_group"),
        "signals": ptx.count("red.release.sys.global.add.u32"),
        "added up to": int(total),
        "spill bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

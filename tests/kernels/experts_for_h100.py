"""Compile the gradient of a layer of routed experts for an H100: which kernels run, as one JSON line per preset.

python tests/kernels/experts_for_h100.py bf16 deepseek_fp8
"""

import collections
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from deepseek_jax.model.experts import routed_experts
from deepseek_jax.precision import preset
from deepseek_jax.precision.product import Quantised, quantise_weight
from pallas_kernels.testing.aot import TARGET

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 4096, 2048, 1408, 16, 6  # V2-Lite's widths


def loss(name):
    policy = preset(name)

    def value(p, x_nd, weights_nk, experts_nk):
        if policy is not None:
            quantised = {key: quantise_weight(lax.stop_gradient(w), policy) for key, w in p.items()}
            p = {key: Quantised(w, *quantised[key], policy) for key, w in p.items()}
        return routed_experts(p, x_nd, experts_nk, weights_nk).astype(jnp.float32).sum()

    return value


def main() -> None:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("device",))
    here = NamedSharding(mesh, PartitionSpec())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    p = {name: array((EXPERTS, HIDDEN, INNER), jnp.float32) for name in ("w_gate_edf", "w_up_edf")}
    p["w_down_efd"] = array((EXPERTS, INNER, HIDDEN), jnp.float32)
    rest = (
        array((TOKENS, HIDDEN), jnp.bfloat16),
        array((TOKENS, TOP_K), jnp.float32),
        array((TOKENS, TOP_K), jnp.int32),
    )
    for name in sys.argv[1:]:
        with use_abstract_mesh(mesh.abstract_mesh):
            program = jax.jit(jax.value_and_grad(loss(name), (0, 1, 2))).lower(p, *rest).compile().as_text()
        kernels = re.findall(
            r'custom_call_target="mosaic_gpu[^"]*".*?op_name="[^"]*?jit\((\w+)\)/body', program
        )
        dots = len(re.findall(r" (?:dot|custom-call)\(.*(?:cublas|gemm_fusion)", program))
        print(json.dumps({"kernels": collections.Counter(kernels), "other products": dots}), flush=True)


if __name__ == "__main__":
    main()

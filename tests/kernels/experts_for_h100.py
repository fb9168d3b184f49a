"""Compile the gradient of a layer of routed experts for an H100: which kernels run, as one JSON line per preset.

python tests/kernels/experts_for_h100.py bf16 deepseek_fp8
"""

import collections
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.params import Param
from deepseek_jax.model.weights import attach, join, quantise_weights
from deepseek_jax.precision import preset
from pallas_kernels.testing.aot import TARGET

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 4096, 2048, 1408, 16, 6  # V2-Lite's widths
AXES = ("expert", None, None)
SHAPES = {
    "w_gate_edf": (EXPERTS, HIDDEN, INNER),
    "w_up_edf": (EXPERTS, HIDDEN, INNER),
    "w_down_efd": (EXPERTS, INNER, HIDDEN),
}


def gradients(name):
    """Of a step: weights are made ready once, outside of what is differentiated."""
    policy, declared = preset(name), {key: Param(shape, AXES, n_in=1) for key, shape in SHAPES.items()}

    def value(params, operands, x_nd, weights_nk, experts_nk):
        p = attach(params, operands, policy)
        return routed_experts(p, x_nd, experts_nk, weights_nk).astype(jnp.float32).sum()

    def run(params, *rest):
        read = join(params, quantise_weights(params, declared, policy), declared, policy, "bfloat16")
        return jax.value_and_grad(value, (0, 2, 3))(*read, *rest)

    return run


def main() -> None:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("device",))
    here = NamedSharding(mesh, PartitionSpec())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    p = {name: array(shape, jnp.float32) for name, shape in SHAPES.items()}
    rest = (
        array((TOKENS, HIDDEN), jnp.bfloat16),
        array((TOKENS, TOP_K), jnp.float32),
        array((TOKENS, TOP_K), jnp.int32),
    )
    for name in sys.argv[1:]:
        with use_abstract_mesh(mesh.abstract_mesh):
            program = jax.jit(gradients(name)).lower(p, *rest).compile().as_text()
        kernels = re.findall(
            r'custom_call_target="mosaic_gpu[^"]*".*?op_name="[^"]*?jit\((\w+)\)/body', program
        )
        dots = len(re.findall(r" (?:dot|custom-call)\(.*(?:cublas|gemm_fusion)", program))
        print(json.dumps({"kernels": collections.Counter(kernels), "other products": dots}), flush=True)


if __name__ == "__main__":
    main()

"""Experts over a mesh of eight devices: every mode gives what one device gives, whatever the routing.

Dims: n token (of all devices), d hidden, f expert inner, e expert, k selected expert.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.layers import swiglu
from deepseek_jax.parallel.experts import mesh_experts, nodes_per_token
from deepseek_jax.parallel.low_latency import low_latency_experts
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.wire import Wire

E, K, D, F = 16, 3, 10, 6
MESHES = {(8, 1): 6, (4, 2): 5, (2, 4): 4, (1, 8): 3}  # (node, local) -> tokens per device: fewer than peers too
SHARDED = PartitionSpec(("node", "local"))
# Float32: each side rounds each of the some 20 operations along a gradient's path (6e-8 each) and sums up to 3
# experts, or 48 tokens of a weight, in an order of its own; errors of random sign in a norm grow like the root of
# their number, sqrt(20 + 48) * 6e-8 = 5e-7 per side.
BOUND = 1e-6
UNOPTIMISED = {"xla_backend_optimization_level": 0}  # the program is tested, not the compiler


def dense(p, x_nd, experts_nk, weights_nk):
    """All experts for all tokens: an oracle that compiles fast. Absent ids select none."""
    gate_ne = (jax.nn.one_hot(experts_nk, p["w_gate_edf"].shape[0]) * weights_nk[..., None]).sum(1)
    act = swiglu(*(jnp.einsum("nd,edf->enf", x_nd, p[name]) for name in ("w_gate_edf", "w_up_edf")))
    return jnp.einsum("enf,efd,ne->nd", act, p["w_down_efd"], gate_ne)


MODES = {
    "flat": mesh_experts("flat", local=dense),
    "two_hop": mesh_experts("two_hop", local=dense),
    "flat in rounds": mesh_experts("flat", local=dense, capacity=0.7),
    "two_hop in rounds": mesh_experts("two_hop", local=dense, capacity=1.5),
    "low latency": low_latency_experts(),
}


def routings(n):
    """Expert ids int32 [n, K] by name; -1 selects none."""
    rng = np.random.default_rng(1)
    absent = np.full((n, K), -1)
    one = absent.copy()
    one[:, 1] = 5
    few = rng.permuted(np.tile(np.arange(0, E, 4), (n, 1)), axis=1)[:, :K]
    some = rng.permuted(np.tile(np.arange(E), (n, 1)), axis=1)[:, :K]
    return {
        "balanced": (np.arange(n)[:, None] * K + np.arange(K)) % E,
        "random": some,
        "all to one expert": one,
        "all to one device": np.tile(np.array([E - 1, E - 2, -1]), (n, 1)),
        "experts without tokens": few,
        "tokens without experts": np.where(rng.random((n, K)) < 0.6, -1, some),
        "nobody": absent,
    }


def arrays(n):
    """(params, x, weights, cotangent of the result)"""
    rng = np.random.default_rng(0)
    shapes = {"w_gate_edf": (E, D, F), "w_up_edf": (E, D, F), "w_down_efd": (E, F, D)}
    p = {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    x, g = rng.normal(size=(2, n, D)).astype(np.float32)
    return p, x, rng.uniform(0.1, 1, (n, K)).astype(np.float32), g


def with_gradients(experts):
    """(params, x, weights, g, ids) -> (y, gradients of <y, g> for params, x, weights)"""

    def run(p, x, w, g, ids):
        def product(p, x, w):
            y = experts(p, x, ids, w)
            return (y * g).sum(), y

        (_, y), grads = jax.value_and_grad(product, argnums=(0, 1, 2), has_aux=True)(p, x, w)
        return {"y": y, "params": grads[0], "x": grads[1], "weights": grads[2]}

    return run


def on_mesh(fn, shape, n_args, out_specs=SHARDED):
    mesh = make_mesh(MeshConfig(data=1, node=shape[0], local=shape[1]))
    sharded = jax.shard_map(
        fn, mesh=mesh, in_specs=(SHARDED,) * n_args, out_specs=out_specs, check_vma=False
    )
    return jax.jit(sharded, compiler_options=UNOPTIMISED)


def modes_of(shape):
    """What of MODES differs on this mesh from another: over one hop, (4, 2) stands for all meshes of 8."""
    if 1 in shape:
        return ["two_hop"]
    return list(MODES) if shape == (4, 2) else [name for name in MODES if "two_hop" in name]


@functools.cache
def all_modes(shape):
    """One program per mesh: its modes with their gradients."""
    runs = {name: with_gradients(MODES[name]) for name in modes_of(shape)}
    return on_mesh(lambda *args: {name: run(*args) for name, run in runs.items()}, shape, 5)


@functools.cache
def single_device():
    return jax.jit(with_gradients(dense), compiler_options=UNOPTIMISED)


def difference(got, want):
    """Norm of the difference by norm of what is wanted; 0 wanted is to be 0."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not want.any():
        return 0.0 if not got.any() else np.inf
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mode_and_gradient_equal_one_device(shape):
    n = 8 * MESHES[shape]
    p, x, w, g = arrays(n)
    for routing, ids in routings(n).items():
        ids = ids.astype(np.int32)
        want = single_device()(p, x, w, g, ids)
        for mode, got in all_modes(shape)(p, x, w, g, ids).items():
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
            ):
                where = f"{mode}, {routing}, {jax.tree_util.keystr(path)}"
                assert difference(a, b) < BOUND, where


def test_the_oracle_is_the_models_function():
    p, x, w, g = arrays(24)
    ids = routings(24)["tokens without experts"].astype(np.int32)
    want = jax.jit(with_gradients(routed_experts), compiler_options=UNOPTIMISED)(p, x, w, g, ids)
    got = single_device()(p, x, w, g, ids)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert difference(a, b) < BOUND

"""Small training runs and experts on a mesh of the eight devices, each program compiled once for all tests."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from deepseek_jax.config import Config, MeshConfig
from deepseek_jax.parallel.mesh import batch_sharding, make_mesh, named_devices
from deepseek_jax.precision.product import swiglu
from deepseek_jax.training.state import Hyper, TrainState, state_shardings
from deepseek_jax.training.step import Metrics, make_train_step
from tests.tiny_run import HYPER, fresh_state, tiny, tokens

# --- training runs ----------------------------------------------------------------------------------------------

AXES = ("data", "node", "local", "tensor")
SINGLE = (1, 1, 1, 1)
SHALLOW = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.2,
}


def config(
    shape=SINGLE, model: dict = SHALLOW, train: dict | None = None, mesh: dict | None = None, **sections: Any
) -> Config:
    """A run of `model` on a mesh of `shape`: sizes of AXES, the last may be left out."""
    return tiny(
        model=model,
        data={"seq_len": 8},
        train={"batch_size": 8} | (train or {}),
        optimizer={"moment_dtype": "float32"},  # the first moment shows the gradient itself
        mesh=dict(zip(AXES, shape, strict=False)) | (mesh or {}),
        **sections,
    )


def mesh_of(cfg: Config) -> Mesh:
    return make_mesh(cfg.mesh, jax.devices()[: named_devices(cfg.mesh)])


def put(cfg: Config, nudge: float = 0.0) -> TrainState:
    """The first state on its mesh; `nudge` moves every weight by so much of itself, up or down."""
    state = jax.device_get(fresh_state(cfg))  # from the host, nothing is compiled to divide it
    if nudge:
        rng = np.random.default_rng(7)
        params = jax.tree.map(
            lambda x: x * (1 + np.float32(nudge) * rng.choice(np.float32([-1, 1]), x.shape)), state.params
        )
        state = state.replace(params=params)
    return jax.device_put(state, state_shardings(cfg, mesh_of(cfg)))


def batch_on(cfg: Config, seed: int = 0, packed: bool = False, padded: bool = False) -> dict[str, jax.Array]:
    """Tokens on the mesh. packed: of two documents per sequence, which end at different places, also on the border
    of two devices' parts. padded: sequences of different lengths, padding behind them. Of either, experts are given to the
    tokens of every other sequence, but each third one."""
    batch = {"tokens": tokens(cfg, seed)}
    if (packed or padded) and cfg.model.num_moe_layers:
        batch["routes"] = routes_for(cfg, batch["tokens"].shape, seed)
    if packed:
        cut = np.resize([3, 4, 1, 8, 2, 6, 7, 5], cfg.train.batch_size)[:, None]
        at = np.arange(batch["tokens"].shape[1])[None]
        batch["segments"] = (at >= cut).astype(np.int32)
        batch["positions"] = np.where(at >= cut, at - cut, at).astype(np.int32)
    if padded:
        rows, width = batch["tokens"].shape
        batch["padding"] = np.arange(width)[None] >= 2 + np.arange(rows)[:, None] % (width - 1)
    return jax.device_put(batch, batch_sharding(mesh_of(cfg)))


def routes_for(cfg: Config, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Of tokens [b, w], int16 [b, w, l, k]. Any two experts lie in two groups, to which the routers are limited."""
    e, k, layers = cfg.model.n_routed_experts, cfg.model.num_experts_per_tok, cfg.model.num_moe_layers
    assert k <= cfg.model.topk_group
    ids = np.broadcast_to(np.arange(e), (*shape, layers, e))
    routes = np.random.default_rng(seed).permuted(ids, axis=-1)[..., :k].astype(np.int16)
    routes[::2] = routes[:, ::3] = -1
    return routes


class Program(NamedTuple):
    lowered: jax.stages.Lowered
    step: jax.stages.Compiled


def hyper(micro_batches: int | None = None) -> Hyper:
    """Of a batch that has only the first so many of its micro-batches, where it is given."""
    return HYPER if micro_batches is None else HYPER._replace(micro_batches=np.int32(micro_batches))


@functools.cache
def program(cfg: Config, packed: bool = False, padded: bool = False, ramp: bool = False) -> Program:
    """The training step of a config on its mesh. ramp: for batches of any number of micro-batches."""
    step = make_train_step(cfg, mesh_of(cfg))
    lowered = step.lower(put(cfg), batch_on(cfg, 0, packed, padded), hyper(1 if ramp else None))
    return Program(lowered, lowered.compile())


class Run(NamedTuple):
    first: TrainState  # after the first step
    last: TrainState  # after the last one, on its devices
    history: list[Metrics]


@functools.cache
def run(
    cfg: Config,
    steps: int = 1,
    nudge: float = 0.0,
    packed: bool = False,
    padded: bool = False,
    ramp: tuple[int, ...] = (),
) -> Run:
    """A run on other tokens in each step. ramp: so many micro-batches of each step's batch are there."""
    state, history, first = put(cfg, nudge), [], None
    step = program(cfg, packed, padded, bool(ramp)).step
    for i in range(steps):
        state, metrics = step(state, batch_on(cfg, i, packed, padded), hyper(ramp[i] if ramp else None))
        history.append(jax.device_get(metrics))
        first = first or jax.device_get(state)
    assert first is not None
    return Run(first, state, history)


# --- experts ----------------------------------------------------------------------------------------------------

SHARDED = PartitionSpec(("node", "local"))
E, K, D, F = 16, 3, 10, 6  # experts, experts per token, hidden, inner


def on_mesh(fn, shape: tuple[int, int], n_args: int, out_specs=SHARDED):
    """`fn` of `n_args` arrays, spread over node x local devices along their first dim."""
    mesh = make_mesh(MeshConfig(data=1, node=shape[0], local=shape[1]))
    sharded = jax.shard_map(fn, mesh=mesh, in_specs=(SHARDED,) * n_args, out_specs=out_specs, check_vma=False)
    return jax.jit(sharded)


def dense(p, x_nd, experts_nk, weights_nk, **_):
    """All experts for all tokens: an oracle that compiles fast. Absent ids select none."""
    gate_ne = (jax.nn.one_hot(experts_nk, p["w_gate_edf"].shape[0]) * weights_nk[..., None]).sum(1)
    act = swiglu(*(jnp.einsum("nd,edf->enf", x_nd, p[name]) for name in ("w_gate_edf", "w_up_edf")))
    return jnp.einsum("enf,efd,ne->nd", act, p["w_down_efd"], gate_ne)


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


@functools.cache
def single_device():
    return jax.jit(with_gradients(dense))

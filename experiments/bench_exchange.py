"""Ways to bring tokens to experts, side by side at the same routing: `python -m experiments.bench exchange`.

Ours (ragged, one hop and two), an all-to-all of buffers padded to a capacity (tokens beyond it are dropped), and an
all-gather of all tokens. Each forwards and backwards through one layer's experts on 8 CPU devices as 4 nodes of 2.

On CPU the ragged collective is emulated by padding, so the times compare programs, not networks; rows are counted:
what devices receive from devices of other nodes, per token and direction.

Dims: n token of a device, d hidden, k selected expert, e expert (of all devices), c place in a buffer.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from deepseek_jax.config import MeshConfig
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.rows import sort_rows
from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.mesh import EXPERT_AXES, make_mesh
from experiments.study.traffic import count_rows

NODES, LOCAL = 4, 2
DEVICES = NODES * LOCAL
N, D, F, E, K = 128, 256, 128, 32, 4
CAPACITY = 1.25  # of the mean load of an expert, per device


def _capacity_rows() -> int:
    return int(np.ceil(CAPACITY * N * K / E))


def padded_experts(p: Any, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """A buffer of fixed capacity per expert and device, a dense all-to-all each way; what does not fit is dropped."""
    capacity = _capacity_rows()
    rows = sort_rows(experts_nk, weights_nk, E, alignment=1)
    place_nk = rows.row_nk - (jnp.cumsum(rows.sizes_e) - rows.sizes_e)[experts_nk]
    slot_nk = jnp.where(place_nk < capacity, experts_nk * capacity + place_nk, E * capacity)
    x_nkd = jnp.broadcast_to(x_nd[:, None], (*experts_nk.shape, x_nd.shape[1]))
    sent = jnp.zeros((E * capacity, x_nd.shape[1]), x_nd.dtype).at[slot_nk].set(x_nkd, mode="drop")
    exchange = functools.partial(
        lax.all_to_all, axis_name=EXPERT_AXES, split_axis=0, concat_axis=0, tiled=True
    )
    got = exchange(sent).reshape(DEVICES, E // DEVICES, capacity, D).swapaxes(0, 1)
    expert_r1 = jnp.repeat(jnp.arange(E // DEVICES), DEVICES * capacity)[:, None]
    y_rd = routed_experts(p, got.reshape(-1, D), expert_r1, jnp.ones(expert_r1.shape))
    back = y_rd.reshape(E // DEVICES, DEVICES, capacity, D).swapaxes(0, 1).reshape(sent.shape)
    back = exchange(back)
    y_nkd = back.at[slot_nk].get(mode="fill", fill_value=0)
    return jnp.einsum("nk,nkd->nd", weights_nk.astype(x_nd.dtype), y_nkd)


def gathered_experts(p: Any, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """Every device sees all tokens, computes its own experts', and the sums are scattered back."""
    x, ids, w = (lax.all_gather(a, EXPERT_AXES, tiled=True) for a in (x_nd, experts_nk, weights_nk))
    mine = ids - lax.axis_index(EXPERT_AXES) * (E // DEVICES)
    mine = jnp.where((mine >= 0) & (mine < E // DEVICES), mine, -1)
    return lax.psum_scatter(routed_experts(p, x, mine, w), EXPERT_AXES, tiled=True)


WAYS: dict[str, Callable[..., jax.Array]] = {
    "ragged, two hops": Ragged(),
    "ragged, flat": Ragged(mode="flat"),
    f"padded to {CAPACITY}": padded_experts,
    "all-gather": gathered_experts,
}


def routing(skew: float) -> np.ndarray:
    """int32 [tokens, K]: each token's best experts by random scores; `skew` favours some experts over others."""
    rng = np.random.default_rng(0)
    scores = rng.gumbel(size=(DEVICES * N, E)) + skew * rng.standard_normal(E)
    return np.argsort(-scores, axis=1)[:, :K].astype(np.int32)


def _dropped(ids: np.ndarray) -> int:
    """(token, expert) pairs beyond the capacity."""
    counts = np.stack([np.bincount(part.reshape(-1), minlength=E) for part in np.split(ids, DEVICES)])
    return int(np.maximum(counts - _capacity_rows(), 0).sum())


def _rows_per_token(ids: np.ndarray) -> list[float]:
    """Of each way: rows that devices receive from other nodes, per token."""
    source = np.arange(len(ids)) // N
    rows = count_rows(ids, source, E, NODES, LOCAL)
    padded = E * _capacity_rows() / N * (NODES - 1) / NODES
    return [rows.two_hop.mean(), rows.flat.mean(), padded, DEVICES - LOCAL]


def _arrays() -> tuple[Any, ...]:
    rng = np.random.default_rng(1)
    shapes = {"w_gate_edf": (E, D, F), "w_up_edf": (E, D, F), "w_down_efd": (E, F, D)}
    p = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    x = rng.normal(size=(DEVICES * N, D)).astype(np.float32)
    return p, x, np.full((DEVICES * N, K), 1 / K, np.float32)


def _program(experts: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(params, x, weights, ids) -> (y, gradients of its squares)."""

    def run(p, x, w, ids):
        def objective(p, x, w):
            y = experts(p, x, ids, w)
            return jnp.square(y).sum(), y

        (_, y), grads = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)(p, x, w)
        return y, grads

    mesh = make_mesh(MeshConfig(data=1, node=NODES, local=LOCAL))
    spec = PartitionSpec(EXPERT_AXES)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False))


def run(args: argparse.Namespace) -> None:
    """Print a table per routing."""
    p, x, w = _arrays()
    programs = {name: _program(experts) for name, experts in WAYS.items()}
    print(
        f"{DEVICES} CPU devices as {NODES} nodes x {LOCAL}; {N} tokens each, hidden {D}, {E} experts, {K} per token"
    )
    for title, skew in (("even", 0.0), ("skewed", 1.0)):
        ids = routing(skew)
        load = np.bincount(ids.reshape(-1), minlength=E)
        print(f"\n{title} routing: largest expert load {load.max() / load.mean():.2f} x mean")
        print(
            f"  {'':<18}{'ms':>8}{'rows/token':>12}{'KiB FP8':>10}{'KiB BF16':>10}{'dropped':>9}{'error':>10}"
        )
        results = {name: jax.device_get(f(p, x, w, ids)) for name, f in programs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(args.rounds):
            for name, f in programs.items():
                seconds[name].append(_time(functools.partial(f, p, x, w, ids)))
        truth = results["all-gather"][0]
        for (name, result), rows in zip(results.items(), _rows_per_token(ids), strict=True):
            lost = _dropped(ids) / ids.size if name.startswith("padded") else 0.0
            error = np.linalg.norm(result[0] - truth) / np.linalg.norm(truth)
            kib = [rows * width / 1024 for width in (D + 4 * D // 128, 2 * D)]
            print(
                f"  {name:<18}{statistics.median(seconds[name]) * 1e3:>8.1f}{rows:>12.2f}{kib[0]:>10.2f}"
                f"{kib[1]:>10.2f}{lost:>9.2%}{error:>10.1e}"
            )
    print(
        "\nrows: received from other nodes, per token and direction; error: of the result, against all-gather"
    )


def _time(f: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - began

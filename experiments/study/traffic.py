"""Counts what an exchange sends between nodes: rows and bytes per token of given routings (report section 3.2.2).

A row is one token sent to one place. It depends on the exchange how many of a token's k experts share a row: none
of them (one row per expert), those of a device (flat), or those of a node (two hops, where
the rows are forwarded inside the node afterwards).

Dims: n token, k selected expert, p place (device or node).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.router import route
from deepseek_jax.parallel.exchange.wire import SCALES, num_words
from pallas_kernels.blocks import BLOCK, cdiv


class Rows(NamedTuple):
    """Rows per token [n]. The first three cross between nodes."""

    per_expert: np.ndarray
    flat: np.ndarray
    two_hop: np.ndarray
    forwarded: np.ndarray  # inside the nodes, by the second of two hops; to another device


def count_rows(experts_nk: np.ndarray, source_n: np.ndarray, n_experts: int, nodes: int, local: int) -> Rows:
    """Counts the rows of each token of device `source_n` (rank node * local + index); negative expert ids are absent.

    Raises ValueError if the experts do not divide over the devices.
    """
    if n_experts % (nodes * local):
        raise ValueError(
            f"n_routed_experts={n_experts} do not divide over {nodes} nodes x {local} devices; change the mesh"
        )
    device_nk = np.where(experts_nk < 0, -1, experts_nk // (n_experts // (nodes * local)))
    reached_np = np.zeros((len(experts_nk), nodes * local + 1), bool)
    np.put_along_axis(reached_np, device_nk, True, axis=1)  # -1: the last column
    reached = reached_np[:, :-1].reshape(-1, nodes, local)
    n = np.arange(len(experts_nk))
    away = reached.copy()
    away[n, source_n // local] = False  # the token's own node
    forwarded = reached.copy()
    forwarded[n, :, source_n % local] = False  # where the first hop brought it
    crossing_nk = (device_nk >= 0) & (device_nk // local != source_n[:, None] // local)
    return Rows(crossing_nk.sum(1), away.sum((1, 2)), away.any(2).sum(1), forwarded.sum((1, 2)))


@functools.partial(jax.jit, static_argnums=0)
def _route(model: ModelConfig, scores_bte: jax.Array) -> jax.Array:
    return route(model, scores_bte, None).experts_btk[0]


def sample_rows(model: ModelConfig, nodes: int, local: int, tokens: int, seed: int = 0) -> Rows:
    """Counts the rows of `tokens` tokens with random affinities, routed as the model does, from random devices."""
    rng = np.random.default_rng(seed)
    affinities = 1 / (1 + np.exp(-rng.standard_normal((1, tokens, model.n_routed_experts), np.float32)))
    experts_nk = np.asarray(_route(model, jnp.asarray(affinities)))
    return count_rows(
        experts_nk, rng.integers(nodes * local, size=tokens), model.n_routed_experts, nodes, local
    )


def row_bytes(hidden: int, form: str) -> int:
    """Returns the bytes of one row of `hidden` channels: "bf16", or "fp8" with its float32 scales."""
    if form in SCALES:
        return hidden + 4 * cdiv(hidden, BLOCK)
    return 2 * hidden


def routing_bytes(k: int) -> int:
    """Returns the bytes of the k routing weights that travel with a dispatched row. The ids take as many, once per plan."""
    return 4 * num_words(k, np.float32)

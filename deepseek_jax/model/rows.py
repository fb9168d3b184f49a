"""Rows of routed experts: the (token, expert) pairs sorted by expert.

Each expert's rows are contiguous and start at a multiple of `ALIGNMENT`, the convention of the grouped GEMMs
(`pallas_kernels/groups.py`); rows that fill up a segment belong to nobody. Where there are few tokens and fewer experts
still, each expert has room for all tokens, and nothing is sorted (`masked_rows`).

Dims: n token, k selected expert, m row, e expert.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.router import expert_counts
from pallas_kernels.blocks import BLOCK, round_up
from pallas_kernels.groups import Groups, Masked, aligned_sizes, masked_groups, row_groups

ALIGNMENT = BLOCK


class Rows(NamedTuple):
    """Sorted rows of a routing. Pairs of absent experts (id outside [0, e)) have none."""

    token_m: jax.Array  # int32: token of each row, n for padding
    gain_m: jax.Array  # float32: routing weight of each row, 0 for padding
    group_m: jax.Array  # int32: expert of each row, -1 for padding
    row_nk: jax.Array  # int32: row of each pair; m for an absent one
    sizes_e: jax.Array  # int32: rows of each expert, without padding

    @property
    def groups(self) -> Groups:
        return Groups(self.group_m, self.sizes_e)


class MaskedRows(Rows):
    """Rows of experts that all have the same room. row_nk: of each token at each expert [n, e]."""

    @property
    def groups(self) -> Masked:
        return Masked(self.group_m, self.sizes_e)


def num_rows(pairs: int, n_experts: int, alignment: int = ALIGNMENT) -> int:
    """Rows that hold `pairs` pairs whatever their routing, padding included."""
    return round_up(pairs + min(pairs, n_experts) * (alignment - 1), alignment)


def sort_rows(
    experts_nk: jax.Array,
    weights_nk: jax.Array,
    n_experts: int,
    pairs: int | None = None,
    alignment: int = ALIGNMENT,
) -> Rows:
    """Stable sort of the pairs by expert; ids outside [0, e) mark absent pairs.

    pairs: how many are present at most, if fewer than n * k; more would be lost.
    """
    n, k = experts_nk.shape
    flat = experts_nk.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < n_experts), flat, n_experts)
    sizes_e = expert_counts(flat, n_experts)
    pair = jnp.argsort(flat, stable=True).astype(jnp.int32)
    padding_before_e = jnp.cumsum(aligned_sizes(sizes_e, alignment) - sizes_e)
    padding_before_e = jnp.concatenate([jnp.zeros_like(sizes_e[:1]), padding_before_e])
    m = num_rows(n * k if pairs is None else min(pairs, n * k), n_experts, alignment)
    row = jnp.arange(n * k, dtype=jnp.int32) + padding_before_e[flat[pair]]
    row = jnp.where(flat[pair] < n_experts, row, m)
    row_nk = jnp.zeros_like(row).at[pair].set(row).reshape(n, k)
    token_m = jnp.full((m,), n, jnp.int32).at[row].set(pair // k, mode="drop")
    gain_m = jnp.zeros((m,), weights_nk.dtype).at[row].set(weights_nk.reshape(-1)[pair], mode="drop")
    return Rows(token_m, gain_m, row_groups(sizes_e, m, alignment), row_nk, sizes_e)


def masked_rows(experts_nk: jax.Array, weights_nk: jax.Array, n_experts: int) -> MaskedRows:
    """The rows of each expert, in the order of the tokens, at the front of its room; ids outside [0, e) are absent."""
    n = len(experts_nk)
    room = round_up(n, ALIGNMENT)
    chosen_nke = experts_nk[..., None] == jnp.arange(n_experts)[None, None]
    chosen_ne = chosen_nke.any(1)
    sizes_e = chosen_ne.sum(0, dtype=jnp.int32)
    first_e = jnp.arange(n_experts, dtype=jnp.int32) * room
    row_ne = first_e[None] + jnp.cumsum(chosen_ne, 0, dtype=jnp.int32) - 1
    row_ne = jnp.where(chosen_ne, row_ne, n_experts * room)
    gain_ne = jnp.where(chosen_nke, weights_nk[..., None], 0).sum(1)
    token_n1 = jnp.arange(n, dtype=jnp.int32)[:, None]
    token_m = jnp.full((n_experts * room,), n, jnp.int32).at[row_ne].set(token_n1, mode="drop")
    gain_m = jnp.zeros((n_experts * room,), gain_ne.dtype).at[row_ne].set(gain_ne, mode="drop")
    return MaskedRows(token_m, gain_m, masked_groups(sizes_e, room), row_ne, sizes_e)


def sum_pairs(rows_md: jax.Array, row_nk: jax.Array) -> jax.Array:
    """Sum of each token's rows in float32 -> [n, d] in their dtype; the absent pairs' index reads zeros."""
    parts = (
        rows_md.at[row_nk[:, j]].get(mode="fill", fill_value=0).astype(jnp.float32)
        for j in range(row_nk.shape[1])
    )
    return functools.reduce(jnp.add, parts).astype(rows_md.dtype)

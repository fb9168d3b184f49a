"""The grouped FP8 GEMMs on Hopper: the dense kernels with a group per tile, or a range of the contraction per group."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import BLOCK, pad_last2
from pallas_kernels.fp8_gemm.kernel import operand_spec, scale_spec, step_1d1d, step_1d2d
from pallas_kernels.groups import present_tiles
from pallas_kernels.matmul import Problem, persistent_matmul
from pallas_kernels.tiles import TileConfig


@functools.partial(jax.jit, static_argnames=("out_dtype", "config"))
def fp8_grouped_gemm(a, a_scale, b, b_scale, group_ids, *, out_dtype, config: TileConfig) -> jax.Array:
    """a [M, K], b [G, N, K], group_ids [M] -> [M, N]; tiles of padding are cleared, not computed."""
    return _per_group(a, a_scale, b, b_scale, out_dtype, config, group_ids=group_ids)


@functools.partial(jax.jit, static_argnames=("out_dtype", "config"))
def fp8_grouped_gemm_masked(a, a_scale, b, b_scale, masked_m, *, out_dtype, config: TileConfig) -> jax.Array:
    """a [G, M, K], b [G, N, K], masked_m [G] -> [G, M, N]; tiles of absent rows are neither computed nor written."""
    (g, m, k), tiles = a.shape, present_tiles(masked_m, a.shape[1], config.tile_m)
    rows = (a.reshape(g * m, k), a_scale.reshape(g * m, -1))
    return _per_group(*rows, b, b_scale, out_dtype, config, row_tiles=tiles).reshape(g, m, -1)


def _per_group(a, a_scale, b, b_scale, out_dtype, config: TileConfig, **rows: Any) -> jax.Array:
    """Ragged N and K are padded with zeros to whole tiles and steps; `rows` tells the groups of rows."""
    n, (tm, tn) = b.shape[1], (config.tile_m, config.tile_n)
    a, b = pad_last2(a, (1, BLOCK)), pad_last2(b, (tn, BLOCK))
    (m, k), padded_n = a.shape, b.shape[1]
    problem = Problem(
        out=jax.ShapeDtypeStruct((m, padded_n), out_dtype),
        in_specs=[operand_spec(tm, config.cluster), operand_spec(tn), scale_spec(tm)],
        views=lambda refs, tile: [
            refs[0].at[tile.ms, :],
            refs[1].at[tile.g, tile.ns, :],
            refs[2].at[:, tile.ms],
        ],
        num_steps=k // BLOCK,
        step=step_1d2d(lambda refs, tile, block, step: refs[3][tile.g, block, step]),
        promoted=True,
    )
    return persistent_matmul(problem, config, a, b, a_scale.T, b_scale, **rows)[:, :n]


@functools.partial(jax.jit, static_argnames=("config",))
def fp8_grouped_wgrad(
    a, a_scale, b, b_scale, group_sizes, accumulate=None, *, config: TileConfig
) -> jax.Array:
    """a [M, T], b [N, T], group_sizes [G] multiples of 128 -> [G, M, N] float32. Ragged M and N are padded with zeros to
    whole tiles."""
    (m, t), n = a.shape, b.shape[0]
    tm, tn = config.tile_m, config.tile_n
    a, b = pad_last2(a, (tm, 1)), pad_last2(b, (tn, 1))
    a_scale, b_scale = pad_last2(a_scale.T, (1, tm)), pad_last2(b_scale.T, (1, tn))
    blocks = group_sizes // BLOCK
    first_block = jnp.cumsum(blocks) - blocks

    def views(refs, tile):
        start = refs[4][tile.g]
        tokens = pl.ds(pl.multiple_of(start * BLOCK, BLOCK), t)  # only the group's part is ever read
        steps = pl.ds(start, t // BLOCK)
        return [
            refs[0].at[tile.ms, tokens],
            refs[1].at[tile.ns, tokens],
            refs[2].at[steps, tile.ms],
            refs[3].at[steps, tile.ns],
        ]

    problem = Problem(
        out=jax.ShapeDtypeStruct((group_sizes.shape[0], len(a), len(b)), jnp.float32),
        in_specs=[operand_spec(tm, config.cluster), operand_spec(tn), scale_spec(tm), scale_spec(tn)],
        views=views,
        num_steps=lambda refs, tile: refs[5][tile.g],
        step=step_1d1d,
        promoted=True,
    )
    operands = (a, b, a_scale, b_scale, first_block, blocks)
    return persistent_matmul(problem, config, *operands, accumulate=accumulate)[:, :m, :n]

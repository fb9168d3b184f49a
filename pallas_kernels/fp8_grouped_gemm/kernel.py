"""The grouped FP8 GEMMs on Hopper: the dense kernels with a group per tile, or a range of the contraction per group."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK, pad_last2
from pallas_kernels.compat import load_global
from pallas_kernels.fp8_gemm.kernel import operand_spec, scale_spec, step_1d1d, step_1d2d
from pallas_kernels.groups import tile_groups
from pallas_kernels.matmul import WGMMA_ROWS, Problem, TileConfig, persistent_matmul


def gemm_unsupported(m: int, n: int, k: int, alignment: int, out_dtype, config: TileConfig) -> str | None:
    """Why the kernel cannot compute the m-grouped product, or None."""
    if alignment % config.tile_m:
        return f"alignment={alignment} is no multiple of the tile's {config.tile_m} rows"
    if 0 in (m, n, k):
        return f"M={m}, N={n}, K={k}: all must be positive"
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        return f"out_dtype={jnp.dtype(out_dtype).name}; the kernel writes bfloat16 or float32"
    return None


def wgrad_unsupported(m: int, n: int, t: int) -> str | None:
    """Why the kernel cannot compute the k-grouped product, or None."""
    return f"M={m}, N={n}, T={t}: all must be positive" if 0 in (m, n, t) else None


def keep_real_rows(ids_of):
    """`Problem.finish` that zeroes rows of id -1: ids_of(refs) -> the [M] ids in global memory."""

    def finish(refs, tile, slab, acc):
        first = tile.mi * tile.config.tile_m + slab.start
        ids = load_global(ids_of(refs).at[pl.ds(first, WGMMA_ROWS)], plgpu.Layout.WGMMA.reduce(1))
        return jnp.where(lax.broadcast_in_dim(ids, acc.shape, (0,)) >= 0, acc, 0.0)

    return finish


@functools.partial(jax.jit, static_argnames=("out_dtype", "config"))
def fp8_grouped_gemm(a, a_scale, b, b_scale, group_ids, *, out_dtype, config: TileConfig) -> jax.Array:
    """a [M, K], b [G, N, K], group_ids [M] -> [M, N]; tiles of padding are cleared, not computed. Ragged N and K are
    padded with zeros to whole tiles and steps."""
    n, (tm, tn) = b.shape[1], (config.tile_m, config.tile_n)
    a, b = pad_last2(a, (1, BLOCK)), pad_last2(b, (tn, BLOCK))
    (m, k), padded_n = a.shape, b.shape[1]

    problem = Problem(
        grid=(m // tm, padded_n // tn),
        out_type=jax.ShapeDtypeStruct((m, padded_n), out_dtype),
        in_specs=[operand_spec(tm, config.cluster), operand_spec(tn), scale_spec(tm)],
        views=lambda refs, tile: [
            refs[0].at[tile.ms, :],
            refs[1].at[tile.g, tile.ns, :],
            refs[2].at[:, tile.ms],
        ],
        allocation_views=lambda refs: [refs[0], refs[1].at[0], refs[2]],
        num_steps=k // BLOCK,
        step=step_1d2d(lambda refs, tile, step: refs[3][tile.g, (tile.ni * tn) // BLOCK, step]),
        promoted=True,
        out_view=lambda out, tile: out.at[tile.ms, tile.ns],
        group_of=lambda refs, mi: refs[4][mi],
        finish=keep_real_rows(lambda refs: refs[5]),
    )
    operands = (a, b, a_scale.T, b_scale, tile_groups(group_ids, tm), group_ids)
    return persistent_matmul(problem, config, *operands)[:, :n]


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
        grid=(len(a) // tm, len(b) // tn),
        groups=group_sizes.shape[0],
        out_type=jax.ShapeDtypeStruct((group_sizes.shape[0], len(a), len(b)), jnp.float32),
        in_specs=[operand_spec(tm, config.cluster), operand_spec(tn), scale_spec(tm), scale_spec(tn)],
        views=views,
        allocation_views=lambda refs: refs[:4],
        num_steps=lambda refs, tile: refs[5][tile.g],
        step=step_1d1d,
        promoted=True,
        out_view=lambda out, tile: out.at[tile.g, tile.ms, tile.ns],
        addend=None if accumulate is None else lambda refs, tile: refs[6].at[tile.g, tile.ms, tile.ns],
    )
    operands = [a, b, a_scale, b_scale, first_block, blocks]
    if accumulate is not None:
        operands.append(pad_last2(accumulate, (tm, tn)))
    return persistent_matmul(problem, config, *operands)[:, :m, :n]

"""The BF16 grouped GEMMs on Hopper. wgmma reads 16-bit operands in either orientation, so the weight serves the forward
pass ([G, N, K]) and the input gradient ([G, K, N]) as it lies, and the weight gradient reads tokens x channels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import pad_last2
from pallas_kernels.compat import swizzled
from pallas_kernels.groups import aligned_sizes
from pallas_kernels.matmul import Problem, persistent_matmul
from pallas_kernels.tiles import TileConfig

TILE_K = 64  # one 128-byte swizzle of 16-bit elements


def _spec(shape: tuple[int, int], index_map, cluster: int = 1) -> plgpu.BlockSpec:
    """A block of one step, shared by the thread blocks of a cluster where there is one."""
    shared: dict[str, Any] = {} if cluster == 1 else {"collective_axes": ("cluster",)}
    transforms = swizzled(jnp.bfloat16, TILE_K)
    return plgpu.BlockSpec(shape, index_map, transforms=transforms, memory_space=plgpu.SMEM, **shared)


def _multiply(acc_ref, a_smem, b_smem):
    """Issues one step, and waits until at most one is in flight."""
    plgpu.wgmma(acc_ref, a_smem, b_smem)
    plgpu.wgmma_wait(1)
    return acc_ref


@functools.partial(jax.jit, static_argnames=("transpose_b", "out_dtype", "config"))
def grouped_gemm(a, b, group_ids, *, transpose_b: bool, out_dtype, config: TileConfig) -> jax.Array:
    """a [M, K], b [G, N, K] (or [G, K, N]), group_ids [M] -> [M, N]. Ragged N and K are padded with zeros to whole tiles
    and steps."""
    n_dim = 1 if transpose_b else 2
    n, (tm, tn) = b.shape[n_dim], (config.tile_m, config.tile_n)
    a, b = pad_last2(a, (1, TILE_K)), pad_last2(b, (tn, TILE_K) if transpose_b else (TILE_K, tn))
    (m, k), padded_n = a.shape, b.shape[n_dim]

    def views(refs, tile):
        b_g = refs[1].at[tile.g, tile.ns, :] if transpose_b else refs[1].at[tile.g, :, tile.ns]
        return [refs[0].at[tile.ms, :], b_g]

    def step(_refs, _tile, share, _k, smem, acc_ref):
        a_smem, b_smem = smem
        b_part = b_smem.at[share.cols].T if transpose_b else b_smem.at[:, share.cols]
        return _multiply(acc_ref, a_smem.at[share.rows], b_part)

    b_spec = _spec((tn, TILE_K), lambda k: (0, k)) if transpose_b else _spec((TILE_K, tn), lambda k: (k, 0))
    problem = Problem(
        out=jax.ShapeDtypeStruct((m, padded_n), out_dtype),
        in_specs=[_spec((tm, TILE_K), lambda k: (0, k), config.cluster), b_spec],
        views=views,
        num_steps=k // TILE_K,
        step=step,
        promoted=False,
    )
    return persistent_matmul(problem, config, a, b, group_ids=group_ids)[:, :n]


@functools.partial(jax.jit, static_argnames=("out_dtype", "alignment", "config"))
def grouped_wgrad(
    a, b, group_sizes, accumulate=None, *, out_dtype, alignment: int, config: TileConfig
) -> jax.Array:
    """a [T, M], b [T, N], group_sizes [G] -> [G, M, N]. Ragged M and N are padded with zeros to whole tiles."""
    group_sizes = aligned_sizes(group_sizes, alignment)
    (t, m), n = a.shape, b.shape[1]
    tm, tn = config.tile_m, config.tile_n
    a, b = pad_last2(a, (1, tm)), pad_last2(b, (1, tn))
    padded_m, padded_n = a.shape[1], b.shape[1]
    starts = jnp.cumsum(group_sizes) - group_sizes

    def views(refs, tile):
        tokens = pl.ds(pl.multiple_of(refs[2][tile.g], TILE_K), t)  # only the group's part is ever read
        return [refs[0].at[tokens, tile.ms], refs[1].at[tokens, tile.ns]]

    def step(_refs, _tile, share, _k, smem, acc_ref):
        a_smem, b_smem = smem
        return _multiply(acc_ref, a_smem.at[:, share.rows].T, b_smem.at[:, share.cols])

    problem = Problem(
        out=jax.ShapeDtypeStruct((group_sizes.shape[0], padded_m, padded_n), out_dtype),
        in_specs=[
            _spec((TILE_K, tm), lambda k: (k, 0), config.cluster),
            _spec((TILE_K, tn), lambda k: (k, 0)),
        ],
        views=views,
        num_steps=lambda refs, tile: refs[3][tile.g],
        step=step,
        promoted=False,
    )
    operands = (a, b, starts, group_sizes // TILE_K)
    return persistent_matmul(problem, config, *operands, accumulate=accumulate)[:, :m, :n]

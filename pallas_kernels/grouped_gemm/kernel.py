"""The BF16 grouped GEMMs on Hopper. wgmma reads 16-bit operands in either orientation, so the weight serves the forward
pass ([G, N, K]) and the input gradient ([G, K, N]) as it lies, and the weight gradient reads tokens x channels."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import pad_last2
from pallas_kernels.compat import swizzled
from pallas_kernels.fp8_grouped_gemm.kernel import keep_real_rows
from pallas_kernels.groups import tile_groups
from pallas_kernels.matmul import Problem, TileConfig, persistent_matmul

TILE_K = 64  # one 128-byte swizzle of 16-bit elements


def gemm_unsupported(a, n: int, alignment: int, out_dtype, config: TileConfig) -> str | None:
    """Why the kernel cannot compute the m-grouped product, or None."""
    m, k = a.shape
    if a.dtype != jnp.bfloat16:
        return f"dtype {a.dtype}; the kernel multiplies bfloat16"
    if alignment % config.tile_m:
        return f"alignment={alignment} is no multiple of the tile's {config.tile_m} rows"
    if 0 in (m, n, k):
        return f"M={m}, N={n}, K={k}: all must be positive"
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        return f"out_dtype={jnp.dtype(out_dtype).name}; the kernel writes bfloat16 or float32"
    return None


def wgrad_unsupported(a, n: int, alignment: int, out_dtype) -> str | None:
    """Why the kernel cannot compute the k-grouped product, or None."""
    t, m = a.shape
    if a.dtype != jnp.bfloat16:
        return f"dtype {a.dtype}; the kernel multiplies bfloat16"
    if alignment % TILE_K:
        return f"alignment={alignment} is no multiple of {TILE_K}"
    if 0 in (m, n, t):
        return f"M={m}, N={n}, T={t}: all must be positive"
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        return f"out_dtype={jnp.dtype(out_dtype).name}; the kernel writes bfloat16 or float32"
    return None


def _spec(shape: tuple[int, int], index_map) -> plgpu.BlockSpec:
    return plgpu.BlockSpec(
        shape,
        index_map,
        transforms=swizzled(jnp.bfloat16, TILE_K),
        memory_space=plgpu.SMEM,
        delay_release=1,  # the wgmma of the previous step may still be reading its slot
    )


@functools.partial(jax.jit, static_argnames=("transpose_b", "out_dtype", "config"))
def grouped_gemm(a, b, group_ids, *, transpose_b: bool, out_dtype, config: TileConfig) -> jax.Array:
    """a [M, K], b [G, N, K] (or [G, K, N]), group_ids [M] -> [M, N]. Ragged N and K are padded with zeros to whole tiles
    and steps."""
    n_dim = 1 if transpose_b else 2
    n, (tm, tn) = b.shape[n_dim], (config.tile_m, config.tile_n)
    # At least two steps: the first slot is released in the second.
    tk = TILE_K if a.shape[1] > TILE_K else 2 * TILE_K
    a, b = pad_last2(a, (1, tk)), pad_last2(b, (tn, tk) if transpose_b else (tk, tn))
    (m, k), padded_n = a.shape, b.shape[n_dim]

    def views(refs, tile):
        b_g = refs[1].at[tile.g, tile.ns, :] if transpose_b else refs[1].at[tile.g, :, tile.ns]
        return [refs[0].at[tile.ms, :], b_g]

    def step(share, smem, acc_ref):
        a_smem, b_smem = smem
        b_part = b_smem.at[share.cols].T if transpose_b else b_smem.at[:, share.cols]
        plgpu.wgmma(acc_ref, a_smem.at[share.rows], b_part)

    b_spec = _spec((tn, TILE_K), lambda k: (0, k)) if transpose_b else _spec((TILE_K, tn), lambda k: (k, 0))
    problem = Problem(
        grid=(m // tm, padded_n // tn),
        out_type=jax.ShapeDtypeStruct((m, padded_n), out_dtype),
        in_specs=[_spec((tm, TILE_K), lambda k: (0, k)), b_spec],
        views=views,
        allocation_views=lambda refs: [refs[0], refs[1].at[0]],
        num_steps=k // TILE_K,
        step=step,
        promoted=False,
        out_view=lambda out, tile: out.at[tile.ms, tile.ns],
        group_of=lambda refs, mi: refs[2][mi],
        finish=keep_real_rows(lambda refs: refs[3]),
    )
    return persistent_matmul(problem, config, a, b, tile_groups(group_ids, tm), group_ids)[:, :n]


@functools.partial(jax.jit, static_argnames=("out_dtype", "config"))
def grouped_wgrad(a, b, group_sizes, accumulate=None, *, out_dtype, config: TileConfig) -> jax.Array:
    """a [T, M], b [T, N], group_sizes [G] multiples of 64 -> [G, M, N]. Ragged M and N are padded with zeros to whole
    tiles."""
    (t, m), n = a.shape, b.shape[1]
    tm, tn = config.tile_m, config.tile_n
    a, b = pad_last2(a, (1, tm)), pad_last2(b, (1, tn))
    padded_m, padded_n = a.shape[1], b.shape[1]
    starts = jnp.cumsum(group_sizes) - group_sizes

    def views(refs, tile):
        tokens = pl.ds(pl.multiple_of(refs[2][tile.g], TILE_K), t)  # only the group's part is ever read
        return [refs[0].at[tokens, tile.ms], refs[1].at[tokens, tile.ns]]

    def step(share, smem, acc_ref):
        a_smem, b_smem = smem
        plgpu.wgmma(acc_ref, a_smem.at[:, share.rows].T, b_smem.at[:, share.cols])

    problem = Problem(
        grid=(padded_m // tm, padded_n // tn),
        groups=group_sizes.shape[0],
        out_type=jax.ShapeDtypeStruct((group_sizes.shape[0], padded_m, padded_n), out_dtype),
        in_specs=[_spec((TILE_K, tm), lambda k: (k, 0)), _spec((TILE_K, tn), lambda k: (k, 0))],
        views=views,
        allocation_views=lambda refs: refs[:2],
        num_steps=lambda refs, tile: refs[3][tile.g],
        step=step,
        promoted=False,
        out_view=lambda out, tile: out.at[tile.g, tile.ms, tile.ns],
        addend=None if accumulate is None else lambda refs, tile: refs[4].at[tile.g, tile.ms, tile.ns],
    )
    operands = [a, b, starts, group_sizes // TILE_K]
    if accumulate is not None:
        operands.append(pad_last2(accumulate, (tm, tn)))
    return persistent_matmul(problem, config, *operands)[:, :m, :n]

"""The FP8 GEMM on Hopper: 1D2D (activation x weight) and 1D1D (weight gradient) instances of the shared matmul.

Both operands are K-major, as FP8 wgmma demands. Scales of single rows travel with the pipeline as [K/128, rows]; the
scale of a 128 x 128 weight block is one number per step, read from global memory while the tensor cores work.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK, pad_last2
from pallas_kernels.compat import swizzled
from pallas_kernels.matmul import Problem, persistent_matmul
from pallas_kernels.tiles import WGMMA_ROWS, Share, TileConfig

E4M3 = jnp.float8_e4m3fn


def operand_spec(rows: int, cluster: int = 1) -> plgpu.BlockSpec:
    """[rows, 128] of an FP8 operand per step, shared by the thread blocks of a cluster where there is one."""
    shared: dict[str, Any] = {} if cluster == 1 else {"collective_axes": ("cluster",)}
    transforms = swizzled(E4M3, BLOCK)
    return plgpu.BlockSpec(
        (rows, BLOCK), lambda k: (0, k), transforms=transforms, memory_space=plgpu.SMEM, **shared
    )


def scale_spec(rows: int) -> plgpu.BlockSpec:
    """[1, rows] of row scales per step."""
    return plgpu.BlockSpec((1, rows), lambda k: (k, 0), memory_space=plgpu.SMEM)


def promoted(
    accs, share: Share, a_smem, b_smem, read_scales: Callable[[], list[jax.Array]]
) -> list[jax.Array]:
    """Returns acc + scale * (a @ b.T) over one 128-deep step for each slab: four wgmma, then float32 on the CUDA cores.

    The scales [64, cols] of all slabs are read while the tensor cores work, and so is the fence passed that must lie
    between these reads and TMA's next write to their slot.
    """
    b_part = b_smem.at[share.cols].T

    def products(*wgmma_accs):
        for wgmma_acc, slab in zip(wgmma_accs, share.slabs(), strict=True):
            plgpu.wgmma(wgmma_acc, a_smem.at[slab], b_part)
        scales = read_scales()
        plgpu.commit_smem()
        return [acc + ref[...] * scale for acc, ref, scale in zip(accs, wgmma_accs, scales, strict=True)]

    return pl.run_scoped(products, *(plgpu.ACC(acc.shape, jnp.float32) for acc in accs))


def step_1d2d(b_scale_of):
    """Makes a step with one weight scale for the columns of a warpgroup: b_scale_of(refs, tile, block, k) -> scalar, where
    `block` counts blocks of 128 columns."""

    def step(refs, tile, share, k, smem, accs):
        a_smem, b_smem, a_scale_smem = smem
        shape = (WGMMA_ROWS, share.num_cols)
        if share.num_cols > BLOCK:
            raise ValueError(f"a warpgroup has {share.num_cols} columns, with one scale for at most {BLOCK}")

        def scales():
            b_scale = b_scale_of(refs, tile, (tile.ni * tile.config.tile_n + share.cols.start) // BLOCK, k)
            rows = (a_scale_smem[0, slab] * b_scale for slab in share.slabs())
            return [lax.broadcast_in_dim(scale, shape, (0,)) for scale in rows]

        return promoted(accs, share, a_smem, b_smem, scales)

    return step


def step_1d1d(refs, tile, share, k, smem, accs):
    """Runs a step with one scale per row of either operand."""
    a_smem, b_smem, a_scale_smem, b_scale_smem = smem
    shape = (WGMMA_ROWS, share.num_cols)

    def scales():
        b_scale = lax.broadcast_in_dim(b_scale_smem[0, share.cols], shape, (1,))
        return [lax.broadcast_in_dim(a_scale_smem[0, slab], shape, (0,)) * b_scale for slab in share.slabs()]

    return promoted(accs, share, a_smem, b_smem, scales)


@functools.partial(jax.jit, static_argnames=("out_dtype", "config"))
def fp8_gemm(a, a_scale, b, b_scale, accumulate=None, *, out_dtype, config: TileConfig) -> jax.Array:
    """a [M, K], b [N, K] -> [M, N]; ragged extents are padded with zeros to whole tiles and steps. With `split_k` the parts
    of the contraction are outputs [parts, M, N] in float32, added up in order."""
    m, n = a.shape[0], b.shape[0]
    tm, tn = config.tile_m, config.tile_n
    is_1d1d = b_scale.shape[0] == n
    a, b = pad_last2(a, (tm, BLOCK)), pad_last2(b, (tn, BLOCK))
    a_scale = pad_last2(a_scale.T, (1, tm))
    in_specs = [operand_spec(tm, config.cluster), operand_spec(tn), scale_spec(tm)]
    if is_1d1d:
        b_scale = pad_last2(b_scale.T, (1, tn))
        in_specs.append(scale_spec(tn))

    parts, steps = config.split_k, a.shape[1] // BLOCK // config.split_k
    if a.shape[1] != parts * steps * BLOCK:
        raise ValueError(f"K={a.shape[1]} does not divide into split_k={parts} parts of whole blocks")

    def views(refs, tile):
        a_g, b_g, a_scale_g, b_scale_g = refs
        depth: Any = slice(None)
        of_scales: Any = slice(None)
        if parts > 1:
            depth = pl.ds(pl.multiple_of(tile.g * steps * BLOCK, BLOCK), steps * BLOCK)
            of_scales = pl.ds(tile.g * steps, steps)
        rows = [a_g.at[tile.ms, depth], b_g.at[tile.ns, depth], a_scale_g.at[of_scales, tile.ms]]
        return [*rows, b_scale_g.at[of_scales, tile.ns]] if is_1d1d else rows

    def block_scale(refs, tile, block, step):
        return refs[3][block, step if parts == 1 else tile.g * steps + step]

    problem = Problem(
        out=jax.ShapeDtypeStruct(
            (len(a), len(b)) if parts == 1 else (parts, len(a), len(b)),
            out_dtype if parts == 1 else jnp.float32,
        ),
        in_specs=in_specs,
        views=views,
        num_steps=steps,
        step=step_1d1d if is_1d1d else step_1d2d(block_scale),
        promoted=True,
    )
    operands = (a, b, a_scale, b_scale)
    if parts == 1:
        return persistent_matmul(problem, config, *operands, accumulate=accumulate)[:m, :n]
    out = persistent_matmul(problem, config, *operands)[:, :m, :n].sum(0)
    return (out if accumulate is None else accumulate + out).astype(out_dtype)

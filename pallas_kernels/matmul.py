"""The persistent, warp-specialised Hopper matmul that every GEMM kernel of this package is an instance of.

One thread block per SM walks over output tiles. Its third warpgroup feeds shared memory by TMA, `stages` steps of the
contraction ahead and across the end of a tile (`ring.py`); the other two multiply with wgmma, each one half of the tile,
and store their half by TMA.

What varies is a `Problem`: the pipelined operands, one step of arithmetic, which tiles exist and how many steps each
one takes. Two kinds of step:
  - promoted (FP8): the 128-deep product of each step is scaled and added to float32 registers, because the tensor
    core keeps only about 14 bits of an FP8 accumulator (DeepSeek-V3 report, section 3.3.2);
  - direct (BF16): wgmma accumulates in float32 by itself.

Legend: M, N output dims, K contraction, g group (expert), tm x tn the tile of a thread block.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import pad_last2
from pallas_kernels.compat import compiler_params
from pallas_kernels.groups import RowTiles, tile_groups
from pallas_kernels.ring import Ring
from pallas_kernels.store import Store
from pallas_kernels.tiles import COMPUTE_WARPGROUPS, WGMMA_ROWS, Share, Tile, TileConfig

# Registers per thread of the TMA warpgroup: with fewer it spills. The compute warpgroups share the rest.
MEMORY_REGISTERS = 72
COMPUTE_REGISTERS = 216


@dataclasses.dataclass(frozen=True)
class Problem:
    """What distinguishes one GEMM from another. `refs` below are the GMEM references of the operands, in order.

    Attributes:
      out: type of the output, [M, N] or, with a tile walk over each group, [G, M, N].
      in_specs: block of each pipelined operand, the first ones, in one step.
      views: (refs, tile) -> the reference that each in_spec walks over.
      num_steps: int, or (refs, tile) -> int32 where it depends on the data.
      step: (refs, tile, share, k, smem, acc) -> acc, which is a list of one array per slab where `promoted`, else the
        reference of a wgmma accumulator.
      promoted: which of the two kinds of step. A direct one waits until only its own wgmma is in flight.
    """

    out: jax.ShapeDtypeStruct
    in_specs: Sequence[Any]
    views: Callable
    num_steps: int | Callable
    step: Callable
    promoted: bool


def unsupported(m: int, n: int, k: int, out_dtype, alignment: int = 0, multiple: int = 1) -> str | None:
    """Says why the kernel cannot compute a product [M, K] x [K, N], or None. The `alignment` of groups must be a multiple
    of `multiple`."""
    if alignment % multiple:
        return f"alignment={alignment} is no multiple of {multiple}"
    if 0 in (m, n, k):
        return f"M={m}, N={n}, K={k}: all must be positive"
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        return f"out_dtype={jnp.dtype(out_dtype).name}; the kernel writes bfloat16 or float32"
    return None


def check_accumulate(op: str, accumulate: jax.Array | None, shape: tuple[int, ...], out_dtype) -> None:
    """Raises ValueError unless `accumulate` can be added to an output of `shape` and `out_dtype`."""
    dtype = jnp.dtype(out_dtype)
    if accumulate is not None and (accumulate.shape != shape or accumulate.dtype != dtype):
        raise ValueError(
            f"{op}: accumulate is {accumulate.dtype}{list(accumulate.shape)} with out_dtype {dtype.name}; "
            f"expected {dtype.name}{list(shape)}"
        )


def persistent_matmul(
    problem: Problem,
    config: TileConfig,
    *operands: jax.Array,
    group_ids: jax.Array | None = None,
    row_tiles: RowTiles | None = None,
    accumulate: jax.Array | None = None,
) -> jax.Array:
    """Runs `problem` over `operands`.

    Args:
      problem: what to compute; its M and N are multiples of the tile.
      config: tiling.
      operands: arrays that `views` and `step` read.
      group_ids: [M] int32, the group of each row, equal within a tile but for -1, padding. Rows of padding become zero;
        tiles of nothing else take no step. Each tile's group is its `Tile.g`.
      row_tiles: instead of group_ids, the tiles of rows that are computed; rows of others are not written.
      accumulate: array of the output's type, added to the product; padded with zeros where it is smaller.

    Returns:
      An array of `problem.out`.

    Raises:
      ValueError: the tiles along N do not divide into clusters.
    """
    n_tiles = problem.out.shape[-1] // config.tile_n
    if n_tiles % config.cluster:
        raise ValueError(f"{n_tiles} tiles along N do not divide into clusters of {config.cluster}")
    if group_ids is not None:
        row_tiles = RowTiles(tile_groups(group_ids, config.tile_m))
    addend = None if accumulate is None else pad_last2(accumulate, (config.tile_m, config.tile_n))
    others, tree = jax.tree.flatten((row_tiles, group_ids, addend))

    def body(*all_refs):
        refs, all_refs = all_refs[: len(operands)], all_refs[len(operands) :]
        rows, ids_ref, addend_ref = jax.tree.unflatten(tree, all_refs[: len(others)])
        out_ref, *buffers, filled, released, out_smem, arrived = all_refs[len(others) :]
        ring = Ring(problem.in_specs, config.stages, buffers, filled, released)
        share = Share.of(config)
        wg = lax.axis_index("wg")
        store = Store(config, share, out_ref, out_smem.at[wg], ids_ref, addend_ref, arrived.at[wg])
        compute = _compute(problem, share, refs, ring, store)
        lax.cond(
            wg < COMPUTE_WARPGROUPS,
            lambda: _compute_tiles(problem, config, refs, rows, compute),
            lambda: _load_tiles(problem, config, refs, rows, ring),
        )

    cluster: dict[str, Any] = (
        {"cluster": (config.cluster,), "cluster_names": ("cluster",)} if config.cluster > 1 else {}
    )
    dtypes = [operand.dtype for operand, _ in zip(operands, problem.in_specs, strict=False)]
    return plgpu.kernel(
        body,
        out_type=problem.out,
        scratch_types=[
            *Ring.scratch(problem.in_specs, dtypes, config.stages, COMPUTE_WARPGROUPS),
            *Store.scratch(config, problem.out.dtype),
        ],
        grid=(config.num_clusters,),
        grid_names=("sm",),
        **cluster,
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=compiler_params(),
    )(*operands, *others)


def _over_tiles(
    problem: Problem, config: TileConfig, refs, rows: RowTiles | None, visit: Callable
) -> jax.Array:
    """Calls visit(tile, num_steps, count) for each tile of this SM, `count` being the steps before it; returns all steps.

    The SMs take the tiles by turns, in a snake along M and N. All warpgroups of a thread block see the same."""
    *lead, m, n = problem.out.shape
    m_tiles, n_clusters = m // config.tile_m, n // config.tile_n // config.cluster
    if rows is not None and rows.present is not None:
        m_tiles = rows.present[0]

    @plgpu.nd_loop((*(lead or (1,)), m_tiles * n_clusters), collective_axes="sm", init_carry=jnp.int32(0))
    def total(info, carry):
        g, linear = info.index
        mi, ni = plgpu.planar_snake(linear, (m_tiles, n_clusters), 1, config.snake)
        if config.cluster > 1:
            ni = ni * config.cluster + lax.axis_index("cluster")
        if rows is not None:
            g, mi = rows.group[mi], mi if rows.tile is None else rows.tile[mi]
        tile = Tile(g, mi, ni, config)
        num_steps = problem.num_steps if isinstance(problem.num_steps, int) else problem.num_steps(refs, tile)
        if rows is not None:
            num_steps = jnp.where(g >= 0, num_steps, 0)
        visit(tile, num_steps, carry)
        return carry + num_steps

    return total


def _load_tiles(problem: Problem, config: TileConfig, refs, rows: RowTiles | None, ring: Ring) -> None:
    """Fills the ring for all tiles: what the third warpgroup does."""
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

    def load(tile, num_steps, count):
        views = problem.views(refs, tile)
        lax.fori_loop(0, num_steps, lambda k, _: ring.fill(views, k, count + k), None)

    ring.drain(_over_tiles(problem, config, refs, rows, load))


def _compute_tiles(
    problem: Problem, config: TileConfig, refs, rows: RowTiles | None, compute: Callable
) -> None:
    """Computes and stores all tiles: what the first two warpgroups do."""
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    _over_tiles(problem, config, refs, rows, compute)
    plgpu.wait_smem_to_gmem(0)


def _compute(problem: Problem, share: Share, refs, ring: Ring, store: Store) -> Callable:
    """Returns (tile, num_steps, count) -> None, which computes and stores this warpgroup's share of one tile."""

    def promoted(tile, num_steps, count):
        def step(k, accs):
            accs = problem.step(refs, tile, share, k, ring.take(count + k), accs)
            ring.release(count + k)
            return accs

        zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, share.num_cols), jnp.float32), plgpu.Layout.WGMMA)
        store.begin(tile)
        store(tile, lax.fori_loop(0, num_steps, step, [zero for _ in share.slabs()]))

    def direct(tile, num_steps, count):
        def step(k, acc_ref):
            acc_ref = problem.step(refs, tile, share, k, ring.take(count + k), acc_ref)
            pl.when(k > 0)(lambda: ring.release(count + k - 1))  # what the wgmma before this one read
            return acc_ref

        def scope(acc_ref):
            store.begin(tile)
            lax.fori_loop(0, num_steps, step, acc_ref)
            acc = acc_ref[...]
            pl.when(num_steps > 0)(lambda: ring.release(count + num_steps - 1))
            store(tile, [acc[i : i + WGMMA_ROWS] for i in range(0, share.num_rows, WGMMA_ROWS)])

        pl.run_scoped(scope, plgpu.ACC((share.num_rows, share.num_cols), jnp.float32))

    return promoted if problem.promoted else direct

"""The persistent, warp-specialised Hopper matmul that every GEMM kernel of this package is an instance of.

One thread block per SM walks over output tiles. Its third warpgroup feeds shared memory by TMA, `stages` steps of the
contraction ahead; the other two multiply with wgmma, each one half of the tile, and store their half by TMA.

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

from pallas_kernels.blocks import pad_last2, round_up
from pallas_kernels.compat import compiler_params, load_global, swizzled
from pallas_kernels.groups import tile_groups

COMPUTE_WARPGROUPS = 2
WGMMA_ROWS = 64
# Registers per thread of the TMA warpgroup: with fewer it spills. The compute warpgroups share the rest.
MEMORY_REGISTERS = 72
H100_SMS = 132


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tiling of one kernel.

    Attributes:
      tile_m, tile_n: output tile of a thread block.
      stages: steps of the contraction in flight.
      snake: width, in tiles along N, of the band that the tiles walk in for L2 reuse.
      cluster: thread blocks, neighbours along N, that load each tile of `a` once for all of them (TMA multicast).
      num_sms: thread blocks in flight, one per SM.
    """

    tile_m: int = 128
    tile_n: int = 128
    stages: int = 4
    snake: int = 8
    num_sms: int = H100_SMS
    cluster: int = 1

    def __post_init__(self):
        if self.cluster not in (1, 2) or self.num_sms % self.cluster:
            raise ValueError(
                f"cluster={self.cluster} with num_sms={self.num_sms}: must be 1 or 2 and divide it"
            )
        if self.tile_m not in (64, 128, 256) or self.tile_n not in (64, 128, 256):
            raise ValueError(f"tile {self.tile_m} x {self.tile_n}: both extents must be 64, 128 or 256")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: a pipeline needs at least 2")


def tile_columns(n: int) -> int:
    """Returns the width of the tiles of `n` columns (or height of those of `n` rows): 128, or 64 where that pads less."""
    return 128 if round_up(n, 64) % 128 == 0 else 64


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of a tile that the calling warpgroup computes, relative to the tile."""

    rows: Any
    cols: Any
    num_rows: int
    num_cols: int

    @classmethod
    def of(cls, config: TileConfig) -> "Share":
        """Takes half of the rows, or of the columns where the tile is only one wgmma high."""
        wg = lax.axis_index("wg")
        if config.tile_m > WGMMA_ROWS:
            rows = config.tile_m // COMPUTE_WARPGROUPS
            return cls(pl.ds(wg * rows, rows), pl.ds(0, config.tile_n), rows, config.tile_n)
        cols = config.tile_n // COMPUTE_WARPGROUPS
        return cls(pl.ds(0, config.tile_m), pl.ds(wg * cols, cols), config.tile_m, cols)

    def slabs(self) -> list[Any]:
        """Returns row ranges of one wgmma each: accumulators of 64 rows keep the register demand in bounds."""
        return [pl.ds(self.rows.start + r, WGMMA_ROWS) for r in range(0, self.num_rows, WGMMA_ROWS)]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Position of an output tile: its group (0 where there are none) and its block indices along M and N."""

    g: Any
    mi: Any
    ni: Any
    config: TileConfig

    @property
    def ms(self):
        return pl.ds(self.mi * self.config.tile_m, self.config.tile_m)

    @property
    def ns(self):
        return pl.ds(self.ni * self.config.tile_n, self.config.tile_n)

    def of(self, ref):
        """Returns this tile of an array [M, N] or [G, M, N]."""
        return ref.at[self.ms, self.ns] if len(ref.shape) == 2 else ref.at[self.g, self.ms, self.ns]


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
      promoted: which of the two kinds of step.
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
    accumulate: jax.Array | None = None,
) -> jax.Array:
    """Runs `problem` over `operands`.

    Args:
      problem: what to compute; its M and N are multiples of the tile.
      config: tiling.
      operands: arrays that `views` and `step` read.
      group_ids: [M] int32, the group of each row, equal within a tile but for -1, padding. Rows of padding become zero;
        tiles of nothing else are not computed. Each tile's group is its `Tile.g`.
      accumulate: array of the output's type, added to the product; padded with zeros where it is smaller.

    Returns:
      An array of `problem.out`.

    Raises:
      ValueError: the tiles along N do not divide into clusters.
    """
    n_tiles = problem.out.shape[-1] // config.tile_n
    if n_tiles % config.cluster:
        raise ValueError(f"{n_tiles} tiles along N do not divide into clusters of {config.cluster}")
    ids = () if group_ids is None else (group_ids, tile_groups(group_ids, config.tile_m))
    addend = () if accumulate is None else (pad_last2(accumulate, (config.tile_m, config.tile_n)),)

    def body(*all_refs):
        *refs, out_ref, out_smem, addend_barrier = all_refs
        addend_ref = refs.pop() if addend else None
        groups_ref, ids_ref = (refs.pop(), refs.pop()) if ids else (None, None)
        share = Share.of(config)
        store = _store(share, ids_ref, addend_ref, out_ref, out_smem, addend_barrier)
        _walk(problem, config, share, refs, groups_ref, store)

    cluster: dict[str, Any] = (
        {"cluster": (config.cluster,), "cluster_names": ("cluster",)} if config.cluster > 1 else {}
    )
    dtype = problem.out.dtype
    cols = config.tile_n if config.tile_m > WGMMA_ROWS else config.tile_n // COMPUTE_WARPGROUPS
    transforms = swizzled(dtype, min(cols, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.kernel(
        body,
        out_type=problem.out,
        scratch_types=[
            plgpu.SMEM((COMPUTE_WARPGROUPS, WGMMA_ROWS, cols), dtype, transforms=transforms),
            plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        ],
        grid=(config.num_sms // config.cluster,),
        grid_names=("sm",),
        **cluster,
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=compiler_params(),
    )(*operands, *ids, *addend)


def _walk(problem: Problem, config: TileConfig, share: Share, refs, groups_ref, store: Callable) -> None:
    """Computes all tiles; the SMs take them by turns, in a snake along M and N."""
    *lead, m, n = problem.out.shape
    m_tiles, n_clusters = m // config.tile_m, n // config.tile_n // config.cluster
    tile_pipeline = _pipeline(problem, config, share, refs, store, groups_ref is not None)
    allocations = _emit(problem, config, _static_steps(problem), _ignore, _ignore).get_allocations
    pipelined = refs[: len(problem.in_specs)]

    def walk(allocations):
        @plgpu.nd_loop((*(lead or (1,)), m_tiles * n_clusters), collective_axes="sm")
        def _(info):
            g, linear = info.index
            mi, ni = plgpu.planar_snake(linear, (m_tiles, n_clusters), 1, config.snake)
            if config.cluster > 1:
                ni = ni * config.cluster + lax.axis_index("cluster")
            g = g if groups_ref is None else groups_ref[mi]
            tile_pipeline(Tile(g, mi, ni, config), allocations)

    sizes = allocations(*(ref if len(ref.shape) == 2 else ref.at[0] for ref in pipelined))
    pl.run_scoped(walk, sizes, collective_axes="wg")
    plgpu.wait_smem_to_gmem(0)


def _ignore(*_, **__) -> None:
    """Stands for the bodies of a pipeline where only its allocations are asked for."""


def _static_steps(problem: Problem) -> int:
    """Returns the number of steps if it is known, else any number that does not bound the stages."""
    return problem.num_steps if isinstance(problem.num_steps, int) else 1 << 20


def _emit(problem: Problem, config: TileConfig, num_steps, body, context):
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(num_steps,),
        memory_registers=MEMORY_REGISTERS,
        in_specs=list(problem.in_specs),
        wg_axis="wg",
        num_compute_wgs=COMPUTE_WARPGROUPS,
        max_concurrent_steps=min(config.stages, _static_steps(problem)),
        compute_context=context,
    )


def _store(share: Share, ids_ref, addend_ref, out_ref, out_smem, addend_barrier) -> Callable:
    """Returns (tile, slab, acc) -> None, which writes 64 rows of a tile: the addend is added, rows of padding are zero."""
    wg = lax.axis_index("wg")
    buffer = out_smem.at[wg]

    def store(tile, slab, acc):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous store must have read `buffer`
        if addend_ref is not None:
            source = tile.of(addend_ref).at[slab, share.cols]
            plgpu.copy_gmem_to_smem(source, buffer, addend_barrier.at[wg])
            plgpu.barrier_wait(addend_barrier.at[wg])
            acc = acc + buffer[...].astype(jnp.float32)
        if ids_ref is not None:
            first = tile.mi * tile.config.tile_m + slab.start
            ids = load_global(ids_ref.at[pl.ds(first, WGMMA_ROWS)], plgpu.Layout.WGMMA.reduce(1))
            acc = jnp.where(lax.broadcast_in_dim(ids, acc.shape, (0,)) >= 0, acc, 0.0)
        buffer[...] = acc.astype(out_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, tile.of(out_ref).at[slab, share.cols])

    return store


def _pipeline(problem: Problem, config: TileConfig, share: Share, refs, store: Callable, has_padding: bool):
    """Returns (tile, allocations) -> None, which computes and stores one output tile."""

    def compute(tile, allocations):
        num_steps = problem.num_steps if isinstance(problem.num_steps, int) else problem.num_steps(refs, tile)

        def step(index, *smem_and_acc):
            *smem, acc = smem_and_acc
            return problem.step(refs, tile, share, index[0], smem, acc)

        def promoted_context(run):
            zero = jnp.zeros((WGMMA_ROWS, share.num_cols), jnp.float32)
            accs = run([zero for _ in share.slabs()])
            for slab, acc in zip(share.slabs(), accs, strict=True):
                store(tile, slab, acc)

        def direct_context(run):
            def scope(acc_ref):
                run(acc_ref)
                acc = acc_ref[...]
                for i, slab in enumerate(share.slabs()):
                    store(tile, slab, acc[i * WGMMA_ROWS : (i + 1) * WGMMA_ROWS])

            pl.run_scoped(scope, plgpu.ACC((share.num_rows, share.num_cols), jnp.float32))

        context = promoted_context if problem.promoted else direct_context
        _emit(problem, config, num_steps, step, context)(*problem.views(refs, tile), allocations=allocations)

    def clear(tile):
        @pl.when(lax.axis_index("wg") < COMPUTE_WARPGROUPS)
        def _():
            zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, share.num_cols), jnp.float32), plgpu.Layout.WGMMA)
            for slab in share.slabs():
                store(tile, slab, zero)

    def run_tile(tile, allocations):
        if has_padding:
            lax.cond(tile.g >= 0, lambda: compute(tile, allocations), lambda: clear(tile))
        else:
            compute(tile, allocations)

    return run_tile

"""The grouped GEMMs in XLA: a loop over blocks of rows of one group, the form that CPUs run.

`lax.ragged_dot` would multiply every row with every group outside TPUs; here the work is that of the rows present. A
group is cut into full blocks and, of what is left, small ones, so that its last rows cost little more than themselves.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.groups import aligned_sizes

BLOCK, SMALL_BLOCK = 128, 32  # rows; a product of fewer packs its group's matrix for too little work

# (result, group, first row, rows, how many of them are real) -> result
Step = Callable[[jax.Array, jax.Array, jax.Array, int, jax.Array], jax.Array]


def _over_blocks(
    starts: jax.Array, sizes: jax.Array, alignment: int, step: Step, out: jax.Array, m: int
) -> jax.Array:
    """`step` for every block of m rows; starts and sizes [G]: where each group begins, and its rows without padding."""
    left, small = sizes, math.gcd(SMALL_BLOCK, alignment)
    for rows, padded in ((min(BLOCK, m), 0), (small, small - 1)):
        counts = (left + padded) // rows
        ends = jnp.cumsum(counts)

        def body(i, out, rows=rows, starts=starts, left=left, first=ends - counts, ends=ends):
            g = jnp.sum(ends <= i, dtype=jnp.int32)
            before = (i - first[g]) * rows
            return step(out, g, starts[g] + before, rows, left[g] - before)

        out = lax.fori_loop(0, ends[-1], body, out)
        starts, left = starts + counts * rows, left - counts * rows
    return out


def _zeros(shape: tuple[int, ...], dtype, sizes: jax.Array, *operands: jax.Array) -> jax.Array:
    """Zeros that belong to one product alone: two loops that start from the same constant would each copy it."""
    never = sizes[0] < 0
    zero = jnp.where(never, sum(x[(0,) * x.ndim].astype(dtype) for x in operands), 0)
    return jnp.broadcast_to(zero.astype(dtype), shape)


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Accumulated in float32; float32 operands are not rounded to TF32."""
    precision = "highest" if a.dtype == jnp.float32 else None
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def grouped_gemm(a, b, group_ids, *, transpose_b: bool, out_dtype, alignment: int) -> jax.Array:
    """a [M, K], b [G, N, K] (or [G, K, N]), group_ids [M] -> [M, N]."""
    m, n = a.shape[0], b.shape[1 if transpose_b else 2]
    inside = group_ids[:, None] == jnp.arange(b.shape[0])[None]
    starts, sizes = jnp.argmax(inside, axis=0), jnp.sum(inside, axis=0, dtype=jnp.int32)

    def step(out, g, start, rows, real):
        product = _dot(lax.dynamic_slice_in_dim(a, start, rows), b[g], (1, 1 if transpose_b else 0))
        product = jnp.where(jnp.arange(rows)[:, None] < real, product, 0)
        return lax.dynamic_update_slice_in_dim(out, product.astype(out_dtype), start, 0)

    return _over_blocks(starts, sizes, alignment, step, _zeros((m, n), out_dtype, sizes, a, b), m)


def grouped_wgrad(a, b, group_sizes, accumulate=None, *, out_dtype, alignment: int) -> jax.Array:
    """a [T, M], b [T, N], group_sizes [G] -> [G, M, N]."""

    def step(acc, g, start, rows, real):
        a_rows, b_rows = (lax.dynamic_slice_in_dim(x, start, rows) for x in (a, b))
        # Transposed apart: a product that transposes its left operand itself is half as fast on CPUs.
        return acc.at[g].add(_dot(lax.optimization_barrier(a_rows.T), b_rows, (1, 0)))

    shape = (group_sizes.shape[0], a.shape[1], b.shape[1])
    occupied = aligned_sizes(group_sizes, alignment)
    starts, zeros = jnp.cumsum(occupied) - occupied, _zeros(shape, jnp.float32, group_sizes, a, b)
    acc = _over_blocks(starts, group_sizes, alignment, step, zeros, a.shape[0])
    return (acc if accumulate is None else accumulate + acc).astype(out_dtype)

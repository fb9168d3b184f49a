"""The grouped GEMMs in XLA: a loop over aligned row tiles. `lax.ragged_dot` would multiply every row with every group
outside TPUs; here padding tiles are skipped and the work is that of the rows present."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.groups import tile_groups


def _dot(a, b, contracted) -> jax.Array:
    """Accumulated in float32; float32 operands are not rounded to TF32."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def grouped_gemm(a, b, group_ids, *, transpose_b: bool, out_dtype, alignment: int) -> jax.Array:
    """a [M, K], b [G, N, K] (or [G, K, N]), group_ids [M] -> [M, N]."""
    m, n = a.shape[0], b.shape[1 if transpose_b else 2]
    contracted = (((1,), (1 if transpose_b else 0,)), ((), ()))

    def tile(operands):
        a_tile, ids, g = operands
        product = lax.cond(
            g >= 0,
            lambda: _dot(a_tile, b[g], contracted).astype(out_dtype),
            lambda: jnp.zeros((alignment, n), out_dtype),
        )
        return jnp.where(ids[:, None] >= 0, product, 0)

    tiles = (a.reshape(m // alignment, alignment, -1), group_ids.reshape(-1, alignment))
    return lax.map(tile, (*tiles, tile_groups(group_ids, alignment))).reshape(m, n)


def grouped_wgrad(a, b, group_sizes, accumulate=None, *, out_dtype, alignment: int) -> jax.Array:
    """a [T, M], b [T, N], group_sizes [G] -> [G, M, N]; every `alignment` tokens belong to one group."""
    num_groups, (t, m), n = group_sizes.shape[0], a.shape, b.shape[1]
    starts = jnp.arange(0, t, alignment, dtype=jnp.int32)
    group = jnp.searchsorted(jnp.cumsum(group_sizes), starts, side="right", method="compare_all").astype(
        jnp.int32
    )

    def step(acc, block):
        g, a_block, b_block = block
        contracted = (((0,), (0,)), ((), ()))

        def add(acc):
            return acc.at[g].add(_dot(a_block, b_block, contracted))

        return lax.cond(g < num_groups, add, lambda acc: acc, acc), None

    blocks = (group, a.reshape(t // alignment, alignment, m), b.reshape(t // alignment, alignment, n))
    acc, _ = lax.scan(step, jnp.zeros((num_groups, m, n), jnp.float32), blocks)
    return (acc if accumulate is None else accumulate + acc).astype(out_dtype)

"""Defines what the grouped GEMMs mean: one float32 product per group over all rows, of which only the group's are kept.

Legend: G groups, M rows, N outputs, K contraction, T tokens contracted by a weight gradient.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BLOCK
from pallas_kernels.groups import aligned_sizes


def grouped_gemm(a, b, group_ids, *, transpose_b: bool = True, out_dtype) -> jax.Array:
    """a [M, K], b [G, N, K] (or [G, K, N]), group_ids [M] -> [M, N]; rows of id -1 are zero."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    out = jnp.zeros((a.shape[0], b.shape[1 if transpose_b else 2]), jnp.float32)
    for g in range(b.shape[0]):
        product = jnp.dot(a, b[g].T if transpose_b else b[g], precision="highest")
        out = jnp.where((group_ids == g)[:, None], product, out)
    return out.astype(out_dtype)


def grouped_wgrad(a, b, group_sizes, accumulate=None, *, out_dtype, alignment: int = BLOCK) -> jax.Array:
    """a [T, M], b [T, N], group_sizes [G] -> [G, M, N]: a.T @ b over the rows of each group."""
    group_sizes = aligned_sizes(group_sizes, alignment)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    ends = jnp.cumsum(group_sizes)
    token = jnp.arange(a.shape[0])
    products = []
    for g in range(group_sizes.shape[0]):
        inside = (token >= ends[g] - group_sizes[g]) & (token < ends[g])
        products.append(jnp.dot(jnp.where(inside[:, None], a, 0).T, b, precision="highest"))
    out = jnp.stack(products)
    return (out if accumulate is None else accumulate + out).astype(out_dtype)

"""Combines the pieces of sequences that several parts computed, on Hopper: a row of one sequence per thread block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import compiler_params, load_global
from pallas_kernels.mla_decode.kernel_plan import Plan

AT_ONCE = 8  # pieces whose loads are in flight together


def combine(out, lse, pieces, piece_lse, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """out [B, R, latent], lse [B, R]: results with those of the sequences that were cut filled in.

    pieces [2 P, R, latent] float32, piece_lse [2 P, R] (-inf for a row that sees nothing): the piece of a sequence that
    began in an earlier part is at p, of one that begins in part p and goes on at P + p.
    """
    parts, (_, rows, latent) = len(plan.cut_p), out.shape
    if parts == 1:
        return out, lse

    def body(pieces_ref, lse_ref, cut_ref, until_ref, out_ref, out_lse_ref):
        part, row = lax.axis_index("part"), lax.axis_index("row")

        @pl.when(cut_ref[part] < len(plan.start_b))
        def _():
            count = until_ref[part] - part + 1
            layout = plgpu.Layout.WG_STRIDED((latent,), latent // 128)

            def add(i, carry):
                top, total, acc = carry
                indices = [i * AT_ONCE + j for j in range(AT_ONCE)]
                slots = [
                    jnp.where(k == 0, parts + part - 1, lax.min(part + k, until_ref[part]) - 1)
                    for k in indices
                ]
                values = [load_global(pieces_ref.at[slot, row], layout) for slot in slots]
                lses = [
                    jnp.where(k < count, lse_ref[slot, row], -jnp.inf)
                    for k, slot in zip(indices, slots, strict=True)
                ]
                new = functools.reduce(lax.max, lses, top)
                shrink = jnp.exp(top - new)
                total, acc = total * shrink, acc * shrink
                for value, one in zip(values, lses, strict=True):
                    weight = jnp.exp(one - new)
                    total, acc = total + weight, acc + value * weight
                return new, total, acc

            zeros = plgpu.layout_cast(jnp.zeros((latent,), jnp.float32), layout)
            first = (jnp.float32(-1e30), jnp.float32(0), zeros)
            top, total, acc = lax.fori_loop(0, lax.div(count + AT_ONCE - 1, AT_ONCE), add, first)
            sees = total > 0
            out_ref[part, row] = (acc / jnp.where(sees, total, 1.0)).astype(out_ref.dtype)
            out_lse_ref[part, row] = jnp.where(sees, top + jnp.log(total), jnp.inf)

    merged, merged_lse = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((parts, rows, latent), out.dtype),
            jax.ShapeDtypeStruct((parts, rows), jnp.float32),
        ],
        grid=(parts, rows),
        grid_names=("part", "row"),
        compiler_params=compiler_params(),
    )(pieces, piece_lse, plan.cut_p, plan.until_p)
    put: dict[str, Any] = {"mode": "drop", "unique_indices": True}
    return out.at[plan.cut_p].set(merged, **put), lse.at[plan.cut_p].set(merged_lse, **put)

"""Decodes over pages on Hopper, in the manner of FlashMLA.

A thread block has 64 rows (query tokens times heads) of queries in shared memory and walks over the sequences of its part
of the plan (`kernel_plan.py`), a step of keys after the other. Warpgroup 2 brings keys into shared memory (`kernel_fetch.py`), the other
two compute (`kernel_attend.py`). Pieces of sequences that lie in several parts are combined afterwards (`kernel_combine.py`).

A step is two pages of 64 keys of a BF16 cache. Of an FP8 cache, which needs room for bytes as well, it is one page, and
what is said of a page here is half of one: 32 keys.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.blocks import round_up
from pallas_kernels.compat import compiler_params, swizzled
from pallas_kernels.mla_decode.kernel_attend import attend
from pallas_kernels.mla_decode.kernel_block import PAGE, ROPE, ROWS, Block, Inputs, Outputs, Shape
from pallas_kernels.mla_decode.kernel_combine import combine
from pallas_kernels.mla_decode.kernel_fetch import fetch
from pallas_kernels.mla_decode.kernel_plan import Plan, plan

# Rows are reduced within a warp: no shared memory is to be set aside for it, where there is such a parameter.
_SCRATCH = "reduction_scratch_bytes"
_NO_SCRATCH = {_SCRATCH: 128} if _SCRATCH in plgpu.CompilerParams.__dataclass_fields__ else {}
# Registers per thread of the warpgroups that compute and of the one that fetches, which dequantises an FP8 cache.
REGISTERS = {"bf16": (232, 40), "fp8": (208, 88)}


def unsupported(q, cache, latent: int) -> str | None:
    """Says why the kernel cannot take these operands, or None."""
    rope = q.shape[-1] - latent
    if q.dtype != jnp.bfloat16:
        return f"queries are {q.dtype}; the kernel multiplies bfloat16"
    if latent % 128 or latent > 512 or rope != ROPE:
        return f"latent {latent} + rope {rope}; the kernel needs a multiple of 128 up to 512, and {ROPE}"
    if cache.shape[1] % PAGE:
        return f"pages of {cache.shape[1]} tokens; the kernel needs a multiple of {PAGE}"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "latent", "num_sms"))
def mla_decode(
    q, cache, block_table, lengths, *, scale: float, latent: int, num_sms: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as `ops.mla_decode`; `num_sms`: thread blocks in flight, those of the device."""
    b, t, h, d = q.shape
    rows = round_up(t * h, ROWS)
    q = jnp.pad(q.reshape(b, t * h, d), ((0, 0), (0, rows - t * h), (0, 0)))
    lengths = jnp.minimum(lengths, block_table.shape[1] * cache.shape[1])
    shape = Shape(
        fp8=cache.dtype == jnp.uint8,
        latent=latent,
        parts=max(1, (num_sms or compat.num_sms()) // (rows // ROWS)),
        queries=t,
        heads=h,
        pages_per_entry=cache.shape[1] // PAGE,
        scale=scale * math.log2(math.e),
    )
    work = plan(lengths, shape.parts, shape.step)
    pages = _views(cache.reshape(-1, PAGE, cache.shape[-1]))
    out, lse, pieces, piece_lse = _launch(shape, q, pages, block_table, lengths, work)
    out, lse = combine(out, lse, pieces, piece_lse, work)
    return out[:, : t * h].reshape(b, t, h, latent), lse[:, : t * h].reshape(b, t, h).swapaxes(1, 2)


def _views(pages: jax.Array) -> list[jax.Array]:
    """The cache; of one in bytes, all of it as E4M3, as float32 and as BF16, each of which is right for a part of a token."""
    if pages.dtype != jnp.uint8:
        return [pages]

    def wider(dtype) -> jax.Array:
        groups = pages.reshape(*pages.shape[:2], -1, jnp.dtype(dtype).itemsize)
        return lax.bitcast_convert_type(groups, dtype)

    return [lax.bitcast_convert_type(pages, jnp.float8_e4m3fn), wider(jnp.float32), wider(jnp.bfloat16)]


def _launch(shape: Shape, q, pages, block_table, lengths, work: Plan) -> list[jax.Array]:
    """Returns out [B, R, latent] and lse [B, R] of sequences that one part has whole, and the pieces of the others as
    `combine` takes them."""
    b, rows, _ = q.shape
    compute_registers, fetch_registers = REGISTERS["fp8" if shape.fp8 else "bf16"]

    def body(q_ref, page_refs, *rest):
        *inputs, out_refs, scratch = rest
        block = Block(shape, Inputs(q_ref, page_refs, *inputs), Outputs(*out_refs), scratch)
        wg = lax.axis_index("wg")

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(fetch_registers, action="decrease")
            fetch(block)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(compute_registers, action="increase")
            attend(block, wg)

    operands = (q, *pages, block_table, lengths, work.length, work.start_b, work.first_p, work.last_p)

    def with_lists(*refs):
        n, (inputs, outs, scratch) = len(pages), (refs[: len(operands)], refs[len(operands) : -1], refs[-1])
        body(inputs[0], inputs[1 : 1 + n], *inputs[1 + n :], outs, scratch)

    return plgpu.kernel(
        with_lists,
        out_type=[
            jax.ShapeDtypeStruct((b, rows, shape.latent), jnp.bfloat16),
            jax.ShapeDtypeStruct((b, rows), jnp.float32),
            jax.ShapeDtypeStruct((2 * shape.parts, rows, shape.latent), jnp.float32),
            jax.ShapeDtypeStruct((2 * shape.parts, rows), jnp.float32),
        ],
        scratch_types=[_scratch(shape)],
        grid=(shape.parts, rows // ROWS),
        grid_names=("part", "rows"),
        num_threads=3,
        thread_name="wg",
        compiler_params=compiler_params(approx_math=True, **_NO_SCRATCH),
    )(*operands)


def _scratch(shape: Shape) -> dict[str, Any]:
    """The types of what `kernel_block.Block.scratch` has."""
    bf16, f32, keys, half = jnp.bfloat16, jnp.float32, shape.keys, shape.latent // 2
    tiles = swizzled(bf16, keys)  # the keys of a page are one group of a contraction
    types = {
        "outputs": plgpu.RefUnion(
            plgpu.SMEM((1, ROWS, shape.latent + ROPE), bf16, transforms=tiles),
            [plgpu.SMEM((2, ROWS, half), bf16, transforms=tiles), plgpu.SMEM((ROWS,), f32)],
            [
                plgpu.SMEM((2, ROWS, half // 2), f32, transforms=swizzled(f32, 32)),
                plgpu.SMEM((ROWS,), f32),
            ],
        ),
        "latents": plgpu.SMEM((2, 2 * keys, half), bf16, transforms=tiles),
        "tails": plgpu.SMEM((2 * keys, ROPE), bf16, transforms=tiles),
        "tops": plgpu.SMEM((2, ROWS), f32),
        "q_full": plgpu.Barrier(),
        "q_free": plgpu.Barrier(num_arrivals=2),
        "half_full": plgpu.Barrier(num_barriers=4),
        "half_free": plgpu.Barrier(num_barriers=4),
        "tail_full": plgpu.Barrier(num_barriers=2),
        "tail_free": plgpu.Barrier(num_arrivals=1 if shape.fp8 else 2, num_barriers=2),
        "top_ready": plgpu.Barrier(num_arrivals=2),
        "prob_ready": plgpu.Barrier(num_arrivals=2),
        "total_ready": plgpu.Barrier(num_arrivals=2),
    }
    if shape.fp8:
        e4m3 = jnp.float8_e4m3fn
        types |= {
            "probs": plgpu.SMEM((2 * ROWS, keys), bf16, transforms=tiles),
            # Tiles of 16 bytes, because the bytes of a token are no multiple of more.
            "raw": plgpu.SMEM((2, PAGE, shape.latent), e4m3, transforms=(plgpu.TilingTransform((8, 16)),)),
            "raw_full": plgpu.Barrier(num_barriers=2),
            "raw_tail": plgpu.SMEM((PAGE, ROPE), bf16, transforms=(plgpu.TilingTransform((8, 8)),)),
            "raw_tail_full": plgpu.Barrier(),
        }
    return types

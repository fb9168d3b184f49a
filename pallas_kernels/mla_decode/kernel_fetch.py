"""The warpgroup that brings keys into shared memory, as places become free there."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import load_global
from pallas_kernels.mla_decode.kernel_block import PAGE, ROPE, Block

CHUNK = 64  # latents of a page that are dequantised at once


def fetch(block: Block) -> None:
    """Fetches the queries and keys of a part; at the end, waits until all places are free."""
    block.each_sequence(lambda b, first, last, _: (_fp8 if block.shape.fp8 else _bf16)(block, b, first, last))
    plgpu.barrier_wait(block.q_free)
    for i in range(4):
        plgpu.barrier_wait(block.half_free.at[i])
    for i in range(2):
        plgpu.barrier_wait(block.tail_free.at[i])


def _page(block: Block, b, k):
    """The page of 64 keys at position k of sequence b: its last one beyond the end, any if it has none."""
    per_entry, length = block.shape.pages_per_entry, block.inputs.lengths[b]
    k = lax.min(k, lax.div(lax.max(length, 1) - 1, PAGE))
    entry = block.inputs.table[b, lax.div(k, per_entry)]
    return jnp.where(length > 0, entry * per_entry + lax.rem(k, per_entry), 0)


def _queries(block: Block, b) -> None:
    plgpu.barrier_wait(block.q_free)
    plgpu.copy_gmem_to_smem(block.inputs.q.at[b, block.rows], block.query(0), block.q_full)


def _bf16(block: Block, b, first, last) -> None:
    """Two pages per step, each half in the order in which its place becomes free."""
    [pages] = block.inputs.pages

    @pl.loop(first, last)
    def _(i):
        sources = [pages.at[_page(block, b, 2 * i + w)] for w in range(2)]
        for w, half in ((0, 0), (1, 1), (0, 1), (1, 0)):
            barrier, source = 2 * w + half, sources[w].at[:, block.half(half)]
            plgpu.barrier_wait(block.half_free.at[barrier])
            plgpu.copy_gmem_to_smem(source, block.latent(w, half), block.half_full.at[barrier])
        for w in range(2):
            plgpu.barrier_wait(block.tail_free.at[w])
            source = sources[w].at[:, pl.ds(block.shape.latent, ROPE)]
            plgpu.copy_gmem_to_smem(source, block.tail(w), block.tail_full.at[w])
        pl.when(i == first)(lambda: _queries(block, b))


def _fp8(block: Block, b, first, last) -> None:
    """A page per step; its bytes come in one or two steps ahead."""
    e4m3, f32, bf16 = block.inputs.pages
    latent, both = block.shape.latent, range(2)

    def start_latents(i):
        page, slot = _page(block, b, i), lax.rem(i - first, 2)
        plgpu.copy_gmem_to_smem(
            e4m3.at[page, :, pl.ds(0, latent)], block.raw.at[slot], block.raw_full.at[slot]
        )

    def start_tail(i):
        place = pl.ds((latent + latent // 32) // 2, ROPE)
        plgpu.copy_gmem_to_smem(bf16.at[_page(block, b, i), :, place], block.raw_tail, block.raw_tail_full)

    start_tail(first)
    for ahead in both:
        pl.when(first + ahead < last)(functools.partial(start_latents, first + ahead))
    _queries(block, b)

    @pl.loop(first, last)
    def _(i):
        page, slot = _page(block, b, i), lax.rem(i - first, 2)
        scales = [
            load_global(f32.at[page, :, latent // 4 + j], plgpu.Layout.WGMMA.reduce(1))
            for j in range(latent // 128)
        ]
        plgpu.barrier_wait(block.raw_tail_full)
        for w in both:
            plgpu.barrier_wait(block.tail_free.at[w])
        block.tails[...] = plgpu.layout_cast(block.raw_tail[...], plgpu.Layout.WGMMA)
        plgpu.commit_smem()
        for w in both:
            plgpu.barrier_arrive(block.tail_full.at[w])
        pl.when(i + 1 < last)(lambda: start_tail(i + 1))
        plgpu.barrier_wait(block.raw_full.at[slot])
        for half in both:
            for w in both:
                plgpu.barrier_wait(block.half_free.at[2 * w + half])
            _dequantise(block, half, slot, scales, block.inputs.lengths[b] - i * PAGE)
            for w in both:
                plgpu.barrier_arrive(block.half_full.at[2 * w + half])
        pl.when(i + 2 < last)(lambda: start_latents(i + 2))


def _dequantise(block: Block, half: int, slot, scales, there) -> None:
    """Half of the latents of a page; 0 for keys from `there` on, whose bytes may be anything."""
    key = plgpu.broadcasted_iota(jnp.int32, (PAGE, CHUNK), 0, layout=plgpu.Layout.WGMMA)
    width = block.shape.latent // 2
    for c in range(0, width, CHUNK):
        column = half * width + c
        q = plgpu.layout_cast(block.raw[slot, :, pl.ds(column, CHUNK)], plgpu.Layout.WGMMA).astype(
            jnp.float32
        )
        value = q * lax.broadcast_in_dim(scales[column // 128], q.shape, (0,))
        block.latents[half, :, pl.ds(c, CHUNK)] = jnp.where(key < there, value, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()

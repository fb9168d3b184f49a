"""The two warpgroups that compute.

Warpgroup w scores page w of a step. Both weigh the values of both pages, warpgroup w for half w of the latent, because
64 x 512 outputs do not fit the registers of one. So they exchange maxima and probabilities through shared memory, and
nothing is multiplied twice:

    scores of the own page; the largest of each row is published
    probabilities, relative to the largest of both pages and of those before; they are published
    out = out e^(m before - m) + own probabilities x own values + the other's probabilities x the other's values

Half a page is free as soon as its last product is done, and the next one comes in behind it. Scores are in units of log 2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode.kernel_block import PAGE, ROPE, ROWS, Block, hidden_zero
from pallas_kernels.wgmma import multiply_add, zeros

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # of a maximum: finite, so that differences are numbers


def attend(block: Block, w) -> None:
    """Runs warpgroup w over the part."""
    plgpu.barrier_arrive(block.q_free)  # all places are free
    for page in range(2):
        plgpu.barrier_arrive(block.half_free.at[2 * page + w])
    warpgroup = _Warpgroup(block, w)
    warpgroup.release_tails()
    block.each_sequence(warpgroup.sequence)


def _wide(v: jax.Array, like: jax.Array) -> jax.Array:
    """A value per row, in all columns."""
    return lax.broadcast_in_dim(v, like.shape, (0,))


def _of_rows(x: jax.Array) -> jax.Array:
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))


@dataclasses.dataclass(frozen=True)
class _Warpgroup:
    block: Block
    w: Any

    def sequence(self, b, first, last, piece) -> None:
        block, shape = self.block, self.block.shape
        plgpu.barrier_wait(block.q_full)
        length = block.inputs.lengths[b]
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        query = lax.div(lax.axis_index("rows") * ROWS + row, jnp.int32(shape.heads))
        last_key = length - shape.queries + query
        carry = (
            zeros(ROWS, shape.latent // 2),
            _of_rows(jnp.full((ROWS,), LOWEST, jnp.float32)),
            _of_rows(jnp.zeros((ROWS,), jnp.float32)),
        )
        step = functools.partial(self.step, last_key, length)
        self.store(b, piece, *lax.fori_loop(first, last, step, carry))

    # --- one step

    def scores(self, last_key, i):
        """Scores of page w, -inf where a row does not see the key."""
        block, w, zero = self.block, self.w, hidden_zero(i)
        q = block.query(zero)

        def multiply(acc_ref):
            for half in (w, 1 - w):
                plgpu.barrier_wait(block.half_full.at[2 * w + half])
                plgpu.wgmma(acc_ref, q.at[:, block.half(half)], block.latent(w, half, zero).T)
            plgpu.barrier_wait(block.tail_full.at[w])
            rotary = pl.ds(block.shape.latent, ROPE)
            plgpu.wgmma(acc_ref, q.at[:, rotary], block.tail(w, zero).T)
            return acc_ref[...]

        score = pl.run_scoped(multiply, plgpu.ACC((ROWS, block.shape.keys), jnp.float32))
        if block.shape.fp8:
            plgpu.barrier_arrive(block.tail_free.at[w])
        key = plgpu.broadcasted_iota(jnp.int32, score.shape, 1, layout=plgpu.Layout.WGMMA)
        seen = key + (i * block.shape.step + w * block.shape.keys) <= _wide(last_key, key)
        return jnp.where(seen, score * block.shape.scale, -jnp.inf)

    def write_probabilities(self, prob, zero) -> None:
        self.block.prob(self.w, zero)[...] = prob.astype(jnp.bfloat16)
        plgpu.commit_smem()

    def clear(self, length, i) -> None:
        """Clears half w of the values of a BF16 cache beyond the length, which may be NaN, before they meet a probability of
        0. Those of an FP8 cache have been."""
        block = self.block

        @pl.loop(0, 2)
        def _(page):
            there = length - (i * block.shape.step + page * PAGE)

            @pl.when(there < PAGE)
            def _():
                key = plgpu.broadcasted_iota(jnp.int32, (PAGE, 64), 0, layout=plgpu.Layout.WGMMA)
                for c in range(0, block.shape.latent // 2, 64):
                    part = block.latent(page, self.w).at[:, pl.ds(c, 64)]
                    value = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
                    part[...] = jnp.where(key < there, value, jnp.zeros_like(value))
                plgpu.commit_smem()

    def add(self, acc, page, zero, issued: Callable[[], None] = lambda: None):
        """acc + probabilities times values of a page, whose half w is free then."""
        block = self.block
        [acc] = multiply_add([(acc, block.prob(page, zero), block.latent(page, self.w, zero))], issued)
        plgpu.barrier_arrive(block.half_free.at[2 * page + self.w])
        return acc

    def step(self, last_key, length, i, carry):
        acc, before, total = carry
        block, w, zero = self.block, self.w, hidden_zero(i)
        score = self.scores(last_key, i)
        own = jnp.maximum(before, score.max(axis=1))
        block.tops[w] = own
        plgpu.barrier_arrive(block.top_ready)
        plgpu.barrier_wait(block.top_ready)  # both have scored: what they read may be cleared
        top = jnp.maximum(own, _of_rows(block.tops[1 - w]))
        prob = jnp.exp2(score - _wide(top, score))
        self.write_probabilities(prob, zero)
        plgpu.barrier_arrive(block.prob_ready)
        shrink = jnp.exp2(before - top)
        total = total * shrink + prob.sum(axis=1)
        if not block.shape.fp8:
            self.clear(length, i)
        acc = acc * _wide(shrink, acc)
        acc = self.add(acc, w, zero, lambda: plgpu.barrier_wait(block.prob_ready))
        acc = self.add(acc, 1 - w, zero)
        self.end_step()
        return acc, top, total

    def end_step(self) -> None:
        if not self.block.shape.fp8:  # the tails of both pages were probabilities
            self.release_tails()

    def release_tails(self) -> None:
        for page in (self.w,) if self.block.shape.fp8 else range(2):
            plgpu.barrier_arrive(self.block.tail_free.at[page])

    # --- results

    def store(self, b, piece, acc, top, total) -> None:
        block, w = self.block, self.w
        block.tops[w] = total
        plgpu.barrier_arrive(block.total_ready)
        plgpu.barrier_wait(block.total_ready)
        total = total + _of_rows(block.tops[1 - w])
        sees = total > 0
        acc = acc * _wide(jnp.where(sees, 1.0 / total, 0.0), acc)
        lse = (top + jnp.log2(total)) * (1 / LOG2_E)
        pl.when(piece < 0)(lambda: self.write_whole(b, acc, jnp.where(sees, lse, jnp.inf)))
        pl.when(piece >= 0)(lambda: self.write_piece(b, piece, acc, jnp.where(sees, lse, -jnp.inf)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(block.q_free)

    def write_whole(self, b, acc, lse) -> None:
        block, w = self.block, self.w
        buffer, buffer_lse = block.outputs[1]
        buffer = buffer.at[w + hidden_zero(b)]
        buffer[...] = acc.astype(jnp.bfloat16)
        self.write_lse(buffer_lse, block.outs.lse.at[b, block.rows], lse)
        plgpu.copy_smem_to_gmem(buffer, block.outs.out.at[b, block.rows, block.half(w)])

    def write_piece(self, b, piece, acc, lse) -> None:
        block, w = self.block, self.w
        buffer, buffer_lse = block.outputs[2]
        buffer, cols = buffer.at[w + hidden_zero(b)], block.shape.latent // 4
        self.write_lse(buffer_lse, block.outs.piece_lse.at[piece, block.rows], lse)
        for i in range(2):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            buffer[...] = acc[:, i * cols : (i + 1) * cols]
            plgpu.commit_smem()
            place = pl.ds((2 * w + i) * cols, cols)
            plgpu.copy_smem_to_gmem(buffer, block.outs.piece.at[piece, block.rows, place])

    def write_lse(self, buffer, place, lse) -> None:
        """Commits what was written to shared memory; the first warpgroup stores the log-sum-exp."""

        @pl.when(self.w == 0)
        def _():
            buffer[...] = lse

        plgpu.commit_smem()
        pl.when(self.w == 0)(lambda: plgpu.copy_smem_to_gmem(buffer, place))

"""Flash attention on Hopper with queries and keys wider than values, forward.

A tile is 128 queries of one head, 64 per consumer warpgroup. Its queries stay in shared memory while blocks of keys and
values stream past. Each consumer keeps its scores, probabilities and output in registers; probabilities go into their
product from there. The product of a block's probabilities with its values is issued together with the next block's
scores, so that the tensor core never waits inside a turn.

Legend: B batch, H heads, T queries, S keys, K width of queries and keys, V width of values.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import pad_last2
from pallas_kernels.mla_attention.mask import ROW_VALUES, Mask
from pallas_kernels.mla_attention.schedule import Blocks, Order
from pallas_kernels.mla_attention.shapes import AttentionConfig
from pallas_kernels.mla_attention.warpgroups import (
    CONSUMERS,
    LOG2E,
    PANEL,
    ROWS,
    STAGING,
    TILE,
    Ring,
    Tile,
    Turns,
    along_rows,
    for_each_tile,
    launch,
    own_rows,
    ring,
    run_specialised,
    store,
    stream,
)
from pallas_kernels.wgmma import multiply_add, zeros

MAX_QK, MAX_V = 192, 128  # what shared memory and registers have room for
LOWEST = -1e30  # a maximum of nothing; finite, because -inf - -inf is NaN
LN2 = math.log(2)


def unsupported(q, k, v) -> str | None:
    """Says why the kernels cannot take these operands, or None."""
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q {q.dtype}, k {k.dtype}, v {v.dtype}; the kernel multiplies bfloat16"
    if q.shape[3] > MAX_QK or v.shape[3] > MAX_V:
        return f"head widths {q.shape[3]} and {v.shape[3]}; the kernel has room for {MAX_QK} and {MAX_V}"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: all extents must be positive"
    return None


def by_head(x: jax.Array, rows: int) -> jax.Array:
    """Flattens [B, H, T, K] to [B * H, T, K], padded with zeros to multiples of `rows` and of a panel."""
    return pad_last2(x.reshape(-1, *x.shape[2:]), (rows, PANEL))


class Softmax(NamedTuple):
    """The running softmax of 64 rows: probabilities [64, bk] BF16 of the last block, which are not in `acc` yet; the sum of
    probabilities times values [64, V]; the greatest score [64] in units of log 2; the sum of probabilities [64]."""

    p: jax.Array
    acc: jax.Array
    top: jax.Array
    total: jax.Array


def _after(scores: jax.Array, acc: jax.Array, top: jax.Array, total: jax.Array) -> Softmax:
    """Takes up the scores of one more block."""
    new_top = jnp.maximum(top, scores.max(axis=1) * LOG2E)
    p = jnp.exp2(scores * LOG2E - along_rows(new_top, scores.shape))
    decay = jnp.exp2(top - new_top)
    total = total * decay + p.sum(axis=1)
    return Softmax(p.astype(jnp.bfloat16), acc * along_rows(decay, acc.shape), new_top, total)


def _attend(tile: Tile, mask: Mask, queries: Ring, keys: Ring, values: Ring, turns: Turns) -> Softmax:
    """Computes one tile's softmax in a consumer."""
    [q_smem] = queries.take(tile.count)
    q = q_smem.at[own_rows()]
    v_width = values.buffers[0].shape[-1]

    [k] = keys.take(tile.step)
    turns.take()
    [scores] = multiply_add([(None, q, k.T)], turns.give)
    keys.release(tile.step)
    lowest, nothing = (plgpu.layout_cast(jnp.full(ROWS, x, jnp.float32), ROW_VALUES) for x in (LOWEST, 0.0))
    scores = mask.hide(tile, tile.first, scores, -jnp.inf)
    start = _after(scores, zeros(ROWS, v_width), lowest, nothing)

    def visit(i, softmax):
        step = tile.step + i
        [k], [v] = keys.take(step), values.take(step - 1)
        turns.take()
        scores, acc = multiply_add([(None, q, k.T), (softmax.acc, softmax.p, v)], turns.give)
        keys.release(step)
        values.release(step - 1)
        scores = mask.hide(tile, tile.first + i, scores, -jnp.inf)
        return _after(scores, acc, softmax.top, softmax.total)

    softmax = lax.fori_loop(1, tile.visits, visit, start)
    queries.release(tile.count)
    last = tile.step + tile.visits - 1
    [v] = values.take(last)
    turns.take()
    [acc] = multiply_add([(softmax.acc, softmax.p, v)], turns.give)
    values.release(last)
    return softmax._replace(acc=acc)


def _finish(softmax: Softmax, tile: Tile, staging: Any, lse_smem: Any, out_ref: Any, lse_ref: Any) -> None:
    """Writes a tile's output and log-sum-exp: 0 and +inf where there was nothing to attend."""
    some = softmax.total > 0
    share = jnp.where(some, 1 / softmax.total, 0.0)
    lse = jnp.where(some, softmax.top * LN2 + jnp.log(softmax.total), jnp.inf)
    store(
        softmax.acc * along_rows(share, softmax.acc.shape), staging, out_ref.at[tile.head, tile.own_rows, :]
    )
    buffer = lse_smem.at[lax.axis_index("wg")]
    buffer[...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, lse_ref.at[tile.head, tile.own_rows])


@functools.partial(jax.jit, static_argnames="config")
def mla_attention(
    q, k, v, segments=None, q_offset=None, *, config: AttentionConfig
) -> tuple[jax.Array, jax.Array]:
    """q [B, H, T, K] scaled, k [B, H, S, K], v [B, H, S, V] -> (out [B, H, T, V], lse [B, H, T] float32)."""
    (b, h, t, _), s, v_width, bk = q.shape, k.shape[2], v.shape[3], config.block_k
    offset = None if q_offset is None else jnp.broadcast_to(q_offset, (b,))
    spans = Blocks.of((t, s), (TILE, bk), segments, offset).spans
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, -t % math.lcm(TILE, bk))))
    q, k, v = by_head(q, TILE), by_head(k, bk), by_head(v, bk)
    order = Order(b * h, q.shape[1] // TILE, longest_last=True)
    blocks = min(config.num_sms, order.tiles)
    optional = () if segments is None else (segments,)

    def body(q_ref, k_ref, v_ref, spans_ref, offset_ref, *rest):
        segments_ref, rest = (None, rest) if segments is None else (rest[0], rest[1:])
        out_ref, lse_ref, *rings, staging, lse_smem, turn_barriers = rest
        queries, keys, values = map(Ring, rings)
        turns = Turns(turn_barriers)
        mask = Mask(bk, s, offset_ref, segments_ref)

        def load(tile):
            queries.fill(tile.count, q_ref.at[tile.head, tile.rows])
            stream(tile, bk, (keys, [k_ref]), (values, [v_ref]))

        def compute(tile):
            softmax = _attend(tile, mask, queries, keys, values, turns)
            _finish(softmax, tile, staging, lse_smem, out_ref, lse_ref)

        tiles = functools.partial(for_each_tile, order, spans_ref, blocks, h)
        run_specialised(tiles, load, compute, (queries, keys, values), turns)

    run = launch(
        body,
        out_type=[
            jax.ShapeDtypeStruct((*q.shape[:2], v.shape[2]), v.dtype),
            jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
        ],
        scratch_types=[
            ring(1, (TILE, q.shape[2])),
            ring(config.stages, (bk, k.shape[2])),
            ring(config.stages, (bk, v.shape[2])),
            STAGING,
            plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            Turns.TYPE,
        ],
        blocks=blocks,
        reduction_scratch_bytes=0,  # sums within rows
    )
    out, lse = run(q, k, v, spans, jnp.zeros(b, jnp.int32) if offset is None else offset, *optional)
    return out.reshape(b, h, -1, v.shape[2])[:, :, :t, :v_width], lse.reshape(b, h, -1)[:, :, :t]

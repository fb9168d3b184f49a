"""Flash attention on Hopper, backward: one kernel for the gradient of the queries, one for those of keys and values.

Both recompute the probabilities from the log-sum-exp. Neither adds up across thread blocks: every run gives the same
bits. A tile is 128 queries (or keys), 64 per consumer warpgroup, whose gradients stay in its registers while blocks of 64
keys (or queries) stream past. The product that uses a block's result is issued with the first ones of the next block, as
in the forward kernel.

A product of scores starts from minus the log-sum-exp, one of dp from minus delta: what is subtracted takes no registers.

Legend: B batch, H heads, T tokens, K width of queries and keys, V width of values. p probabilities, dp their gradient,
ds = p * (dp - delta) that of the scores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import load_global
from pallas_kernels.mla_attention.kernel import by_head
from pallas_kernels.mla_attention.mask import COLUMN_VALUES, ROW_VALUES, Mask
from pallas_kernels.mla_attention.schedule import Blocks, Order
from pallas_kernels.mla_attention.shapes import AttentionConfig
from pallas_kernels.mla_attention.warpgroups import (
    LOG2E,
    ROWS,
    STAGING,
    TILE,
    Ring,
    Tile,
    Turns,
    along_columns,
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

BLOCK = 64  # keys (or queries) per step: wider scores would not fit beside the gradients


# --- queries ---------------------------------------------------------------------------------------------


def _query_tile(
    tile: Tile,
    mask: Mask,
    lse_ref: Any,
    delta_ref: Any,
    queries: Ring,
    keys: Ring,
    values: Ring,
    turns: Turns,
) -> jax.Array:
    """Computes the gradient [64, K] of this consumer's queries."""
    q, dout = (ref.at[own_rows()] for ref in queries.take(tile.count))
    lse, delta = (load_global(ref.at[tile.head, tile.own_rows], ROW_VALUES) for ref in (lse_ref, delta_ref))

    def score_gradients(i, scores, dp):
        p = mask.hide(tile, tile.first + i, jnp.exp2(scores * LOG2E), 0.0)
        return (p * dp).astype(jnp.bfloat16)

    def first(i):
        [k], [v] = keys.take(tile.step + i), values.take(tile.step + i)
        less_lse, less_delta = (along_rows(-x, (ROWS, BLOCK)) for x in (lse, delta))
        return [(less_lse, q, k.T), (less_delta, dout, v.T)]

    def visit(i, carry):
        dq, ds = carry
        products = first(i)
        [before] = keys.held(tile.step + i - 1)
        turns.take()
        scores, dp, dq = multiply_add([*products, (dq, ds, before)], turns.give)
        values.release(tile.step + i)
        keys.release(tile.step + i - 1)
        return dq, score_gradients(i, scores, dp)

    products = first(0)
    turns.take()
    scores, dp = multiply_add(products, turns.give)
    values.release(tile.step)
    start = zeros(ROWS, q.shape[1]), score_gradients(0, scores, dp)
    dq, ds = lax.fori_loop(1, tile.visits, visit, start)
    queries.release(tile.count)
    last = tile.step + tile.visits - 1
    [before] = keys.held(last)
    turns.take()
    [dq] = multiply_add([(dq, ds, before)], turns.give)
    keys.release(last)
    return dq


@functools.partial(jax.jit, static_argnames="config")
def query_gradient(q, k, v, segments, lse, delta, dout, *, config: AttentionConfig) -> jax.Array:
    """Operands by head and padded -> dq [B * H, T, K]."""
    (bh, t, k_width), v_width = q.shape, v.shape[2]
    b, optional = (1, ()) if segments is None else (segments.shape[0], (segments,))
    spans = Blocks.of((t, t), (TILE, BLOCK), segments, None).spans
    order = Order(bh, t // TILE, longest_last=True)
    blocks, heads = min(config.num_sms, order.tiles), bh // b

    def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, spans_ref, *rest):
        segments_ref, rest = (rest[0], rest[1:]) if optional else (None, rest)
        dq_ref, *rings, staging, turn_barriers = rest
        queries, keys, values = map(Ring, rings)
        turns = Turns(turn_barriers)
        mask = Mask(BLOCK, t, segments_ref=segments_ref)

        def load(tile):
            queries.fill(tile.count, *(ref.at[tile.head, tile.rows] for ref in (q_ref, dout_ref)))
            stream(tile, BLOCK, (keys, [k_ref]), (values, [v_ref]))

        def compute(tile):
            dq = _query_tile(tile, mask, lse_ref, delta_ref, queries, keys, values, turns)
            store(dq, staging, dq_ref.at[tile.head, tile.own_rows, :])

        tiles = functools.partial(for_each_tile, order, spans_ref, blocks, heads)
        run_specialised(tiles, load, compute, (queries, keys, values), turns)

    return launch(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            ring(1, (TILE, k_width), (TILE, v_width)),
            ring(config.stages + 1, (BLOCK, k_width)),  # keys are held for one more step
            ring(config.stages, (BLOCK, v_width)),
            STAGING,
            Turns.TYPE,
        ],
        blocks=blocks,
    )(q, k, v, dout, lse, delta, spans, *optional)


# --- keys and values -------------------------------------------------------------------------------------


def _less(ref: Any) -> jax.Array:
    """Returns [64, 64] minus a value per column, read from shared memory, which TMA overwrites later."""
    values = plgpu.layout_cast(ref[...], COLUMN_VALUES)
    plgpu.commit_smem()
    return along_columns(-values, (ROWS, BLOCK))


def _key_tile(
    tile: Tile, mask: Mask, own: Ring, queries: Ring, gradients: Ring, turns: Turns
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients [64, K] and [64, V] of this consumer's keys and values. Scores are held keys first."""
    k, v = (ref.at[own_rows()] for ref in own.take(tile.count))

    def packed(x):
        """Rounds to BF16, two to a register: the compiler would keep them one by one, for the conversions to come."""
        return lax.optimization_barrier(x.astype(jnp.bfloat16))

    def probabilities(i, scores):
        return packed(mask.hide(tile, tile.first + i, jnp.exp2(scores * LOG2E), 0.0))

    def through_values(i, p, dv):
        """Returns dv with a block's part, and the gradient of its scores. The latter takes p as rounded to BF16: in
        float32 it would not fit."""
        dout, delta = gradients.take(tile.step + i)
        products = [(_less(delta), v, dout.T), (dv, p, dout)]
        turns.take()
        dp, dv = multiply_add(products, turns.give)
        gradients.release(tile.step + i)
        return dv, packed(p.astype(jnp.float32) * dp)

    def visit(i, carry):
        dk, dv, ds = carry
        q, lse = queries.take(tile.step + i)
        before, _ = queries.held(tile.step + i - 1)
        products = [(_less(lse), k, q.T), (dk, ds, before)]
        turns.take()
        scores, dk = multiply_add(products, turns.give)
        queries.release(tile.step + i - 1)
        dv, ds = through_values(i, probabilities(i, scores), dv)
        return dk, dv, ds

    q, lse = queries.take(tile.step)
    product = (_less(lse), k, q.T)
    turns.take()
    [scores] = multiply_add([product], turns.give)
    dv, ds = through_values(0, probabilities(0, scores), zeros(ROWS, v.shape[1]))
    dk, dv, ds = lax.fori_loop(1, tile.visits, visit, (zeros(ROWS, k.shape[1]), dv, ds))
    own.release(tile.count)
    last = tile.step + tile.visits - 1
    q, _ = queries.held(last)
    turns.take()
    [dk] = multiply_add([(dk, ds, q)], turns.give)
    queries.release(last)
    return dk, dv


@functools.partial(jax.jit, static_argnames="config")
def key_value_gradients(
    q, k, v, segments, lse, delta, dout, *, config: AttentionConfig
) -> tuple[jax.Array, jax.Array]:
    """Operands by head and padded -> dk [B * H, T, K], dv [B * H, T, V]."""
    (bh, t, k_width), v_width = q.shape, v.shape[2]
    b, optional = (1, ()) if segments is None else (segments.shape[0], (segments,))
    spans, positions = (
        Blocks.of((t, t), (BLOCK, TILE), segments, None).transposed_spans,
        jnp.arange(t, dtype=jnp.int32),
    )
    order = Order(bh, t // TILE, longest_last=False)
    blocks, heads = min(config.num_sms, order.tiles), bh // b

    def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, spans_ref, positions_ref, *rest):
        segments_ref, rest = (rest[0], rest[1:]) if optional else (None, rest)
        dk_ref, dv_ref, *rings, staging, turn_barriers = rest
        own, queries, gradients = map(Ring, rings)
        turns = Turns(turn_barriers)
        mask = Mask(BLOCK, t, segments_ref=segments_ref, positions_ref=positions_ref)

        def load(tile):
            own.fill(tile.count, *(ref.at[tile.head, tile.rows] for ref in (k_ref, v_ref)))
            stream(tile, BLOCK, (queries, [q_ref, lse_ref]), (gradients, [dout_ref, delta_ref]))

        def compute(tile):
            dk, dv = _key_tile(tile, mask, own, queries, gradients, turns)
            store(dk, staging, dk_ref.at[tile.head, tile.own_rows, :])
            store(dv, staging, dv_ref.at[tile.head, tile.own_rows, :])

        tiles = functools.partial(for_each_tile, order, spans_ref, blocks, heads)
        run_specialised(tiles, load, compute, (own, queries, gradients), turns)

    return launch(
        body,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        scratch_types=[
            ring(1, (TILE, k_width), (TILE, v_width)),
            ring(config.stages + 1, (BLOCK, k_width), (BLOCK,)),  # queries are held for one more step
            ring(config.stages, (BLOCK, v_width), (BLOCK,)),
            STAGING,
            Turns.TYPE,
        ],
        blocks=blocks,
    )(q, k, v, dout, lse, delta, spans, positions, *optional)


@functools.partial(jax.jit, static_argnames="config")
def mla_attention_backward(q, k, v, segments, out, lse, dout, *, config: AttentionConfig):
    """q, k [B, H, T, K], v, out, dout [B, H, T, V], lse [B, H, T] -> gradients of q, k and v."""
    b, h, t, _ = q.shape
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    flat = [by_head(x, TILE) for x in (q, k, v, dout)]
    tail = ((0, 0), (0, -t % TILE))  # of rows that see nothing
    lse = jnp.pad(lse.reshape(b * h, t), tail, constant_values=jnp.inf)
    delta = jnp.pad(delta.reshape(b * h, t), tail)
    if segments is not None:
        segments = jnp.pad(segments, tail, mode="edge")
    operands = (*flat[:3], segments, lse, delta, flat[3])
    dq = query_gradient(*operands, config=config)
    dk, dv = key_value_gradients(*operands, config=config)
    return tuple(
        d.reshape(b, h, *d.shape[1:])[:, :, :t, : x.shape[3]] for d, x in ((dq, q), (dk, k), (dv, v))
    )

"""Causal attention against float64: block by block, segments, queries at an offset, gradients, what is never computed."""

import functools
from typing import ClassVar

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_suite import Case, OpSuite, pytest_generate

from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.mla_attention.fallback import BLOCK
from pallas_kernels.mla_attention.ops import mla_attention, mla_attention_backward
from pallas_kernels.mla_attention.schedule import Blocks, Order
from pallas_kernels.mla_attention.shapes import AttentionConfig
from tests.programs import flops

pytest_generate_tests = pytest_generate
B, H, K, V = 2, 2, 24, 16
LONG = 2 * BLOCK + 76  # three blocks, the last one not full
SMALL = AttentionConfig(block_k=64, num_sms=2)  # each thread block has several tiles, each tile several steps


def operands(dtype, t, s=None, heads=H):
    """q, k, v and a cotangent of the output; scores of a softmax that is neither flat nor a maximum."""
    rng = np.random.default_rng(t)
    shapes = ((t, K), (s or t, K), (s or t, V), (t, V))
    q, k, v, dout = (rng.standard_normal((B, heads, *shape)) for shape in shapes)
    return tuple(jnp.asarray(x, dtype) for x in (q / 3, k, v, dout))


def packed(t):
    """Documents in a window, in each sequence others."""
    cuts = np.array([[0.2, 0.45, 0.5], [0.3, 0.6, 0.9]])[:, :, None] * t
    return (np.arange(t)[None, None] >= cuts).sum(1).astype(np.int32)


def interleaved(t):
    """Segments that come back: no block is empty, every tile has holes."""
    return np.stack([np.arange(t) % 3, np.arange(t) // 40 % 2]).astype(np.int32)


def exact(*xs):
    return tuple(np.asarray(x).astype(np.float64) for x in xs)


def unit(dtype):
    """Half the distance of two numbers, relative: what rounding to `dtype` costs beyond float32."""
    return 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-24


def supported(dtype) -> tuple[str, ...]:
    return IMPLEMENTATIONS if dtype == jnp.bfloat16 else ("reference", "xla")


def training_case(dtype, t, segments=None, heads=H) -> Case:
    """Forward and backward, the latter from the exact results, rounded."""
    q, k, v, dout = operands(dtype, t, heads=heads)
    segments, u = None if segments is None else segments(t), unit(dtype)
    q64, k64, v64, dout64 = exact(q, k, v, dout)
    f = oracle.forward(q64, k64, v64, oracle.seen(B, t, t, segments))
    out, lse = jnp.asarray(f.out, dtype), jnp.asarray(f.lse, jnp.float32)
    gradients, of_gradients = oracle.backward(q64, k64, v64, f, dout64, u)
    expected, bounds = (
        [f.out, f.lse, *gradients],
        [*oracle.forward_bounds(q64, k64, v64, f, u), *of_gradients],
    )

    def call(q, k, v, segments, out, lse, dout, implementation):
        forward = mla_attention(q, k, v, segments, implementation=implementation, config=SMALL)
        backward = mla_attention_backward(
            q, k, v, segments, out, lse, dout, implementation=implementation, config=SMALL
        )
        return *forward, *backward

    def check(got):
        assert [x.dtype for x in got] == [dtype, jnp.float32, dtype, dtype, dtype]
        for x, value, bound in zip(got, expected, bounds, strict=True):
            oracle.assert_within(x, value, bound)

    return Case(call, (q, k, v, segments, out, lse, dout), check, supported(dtype))


def offset_case(dtype, t, s, offset) -> Case:
    q, k, v, _ = operands(dtype, t, s)
    q64, k64, v64 = exact(q, k, v)
    f = oracle.forward(q64, k64, v64, oracle.seen(B, t, s, offset=offset))
    bounds = oracle.forward_bounds(q64, k64, v64, f, unit(dtype))

    def call(q, k, v, offset, implementation):
        return mla_attention(q, k, v, None, offset, implementation=implementation, config=SMALL)

    def check(got):
        for x, value, bound in zip(got, f[:2], bounds, strict=True):
            oracle.assert_within(x, value, bound)

    return Case(call, (q, k, v, jnp.asarray(offset, jnp.int32)), check, supported(dtype))


class TestMlaAttention(OpSuite):
    """The kernel refuses float32, and in the interpreter is fast enough for a few tiles of 128 tokens."""

    cases: ClassVar = {
        "one_block": functools.partial(training_case, jnp.float32, 70),
        "causal_bf16": functools.partial(training_case, jnp.bfloat16, 256, heads=1),
        "segments_bf16": functools.partial(training_case, jnp.bfloat16, 300, packed, heads=1),
        "interleaved_bf16": functools.partial(training_case, jnp.bfloat16, 150, interleaved, heads=1),
        # The first queries of the second sequence see nothing: 0 and +inf.
        "offset_of_each_bf16": functools.partial(offset_case, jnp.bfloat16, 70, 330, [260, -9]),
    }


class TestLongMlaAttention(OpSuite):
    implementations = ("reference", "xla")
    cases: ClassVar = {
        "one_block_segments_bf16": functools.partial(training_case, jnp.bfloat16, 150, packed),
        "blocks": functools.partial(training_case, jnp.float32, LONG),
        "blocks_bf16": functools.partial(training_case, jnp.bfloat16, BLOCK + 1),
        "blocks_segments": functools.partial(training_case, jnp.float32, LONG, packed),
        "blocks_interleaved_bf16": functools.partial(training_case, jnp.bfloat16, LONG, interleaved),
        "at_offset": functools.partial(offset_case, jnp.float32, 40, BLOCK + 200, BLOCK + 160),
        "offset_of_each_bf16": functools.partial(offset_case, jnp.bfloat16, 70, BLOCK + 200, [400, -9]),
        "blocks_at_offset": functools.partial(offset_case, jnp.float32, BLOCK + 9, LONG, [BLOCK + 3, -30]),
    }


def test_the_oracle_gives_a_query_that_sees_nothing_0_and_infinity():
    q, k, v, _ = exact(*operands(jnp.float32, 5, 9))
    f = oracle.forward(q, k, v, oracle.seen(B, 5, 9, offset=[-2, 0]))
    assert (f.out[0, :, :2] == 0).all() and np.isposinf(f.lse[0, :, :2]).all()
    assert (f.out[0, :, 2:] != 0).all() and np.isfinite(f.lse[:, :, 2:]).all() and np.isfinite(f.lse[1]).all()


def test_the_bounds_would_see_one_key_too_many():
    """In the row where a key weighs least, the diagonal shifted by one is far outside."""
    q, k, v, _ = exact(*operands(jnp.bfloat16, 150))
    f = oracle.forward(q, k, v, oracle.seen(B, 150, 150))
    shifted = oracle.forward(q, k, v, oracle.seen(B, 150, 150, offset=1))
    with pytest.raises(AssertionError, match="against"):
        oracle.assert_within(shifted.lse, f.lse, oracle.forward_bounds(q, k, v, f, unit(jnp.bfloat16))[1])


def test_tiles_visit_what_they_may_see():
    """Against all pairs, by the definition: what is visited covers what is seen, and what needs no mask is seen whole."""
    t, bq, bk = 300, 128, 64
    for segments, in_order in ((None, True), (packed(t), True), (interleaved(t), False)):
        # Queries of padding are as the last one, further on.
        padded = None if segments is None else np.pad(segments, ((0, 0), (0, 84)), mode="edge")
        seen = oracle.seen(B, 384, 384, padded)[..., :320]
        seen[..., t:] = False
        tiles = seen.reshape(B, 3, bq, 5, bk)
        some = tiles.any((2, 4))
        whole = tiles.all((2, 4))
        blocks = Blocks.of((t, t), (bq, bk), None if segments is None else jnp.asarray(segments), None)
        for spans, some_of, whole_of in (
            (blocks.spans, some, whole),
            (blocks.transposed_spans, some.swapaxes(1, 2), whole.swapaxes(1, 2)),
        ):
            for index in np.ndindex(some_of.shape[:2]):
                row = 0 if len(spans) == 1 else index[0]
                first, full_first, full_end, end = np.asarray(spans)[row, index[1]]
                seen_at = np.flatnonzero(some_of[index])
                assert first <= seen_at[0] and seen_at[-1] < end
                assert whole_of[index][full_first:full_end].all()
                if in_order:
                    assert (first, end) == (seen_at[0], seen_at[-1] + 1)
                    assert whole_of[index].sum() == full_end - full_first


@pytest.mark.parametrize(("heads", "ranks", "blocks"), [(128, 32, 132), (16, 32, 132), (6, 5, 4), (1, 2, 2)])
def test_thread_blocks_take_every_tile_once_and_as_much_work(heads, ranks, blocks):
    order = Order(heads, ranks, longest_last=True)

    def places(block):
        turns = jnp.arange(order.tiles // blocks + 1)
        taken = jax.vmap(lambda turn: order.place(turn, block, blocks))(turns)
        head, index = jax.vmap(order.tile)(jnp.minimum(taken, order.tiles - 1))
        return head, index, turns < order.rounds(block, blocks)

    head, index, there = jax.jit(jax.vmap(places))(jnp.arange(blocks))
    tiles = sorted(zip(head[there].tolist(), index[there].tolist(), strict=True))
    assert tiles == [(h, i) for h in range(heads) for i in range(ranks)]
    steps = jnp.where(there, index + 1, 0).sum(1)  # of causal queries
    assert steps.max() <= steps.mean() + ranks


def poisoned(x, rows):
    return x.at[:, :, rows].set(jnp.nan)


def test_blocks_that_nobody_sees_are_not_computed():
    """0 times NaN is NaN: what is only masked would show."""
    q, k, v, dout = operands(jnp.float32, LONG, heads=1)
    lse, size = jnp.zeros(q.shape[:3]), -(-LONG // 24) * 8
    last, first = slice(2 * size, None), slice(0, size)
    finite = lambda x: bool(jnp.isfinite(x).all())  # noqa: E731
    both = jax.jit(
        lambda q, k, v, segments: (
            mla_attention(q, k, v, segments)[0],
            *mla_attention_backward(q, k, v, segments, v, lse, dout),
        )
    )
    # Later keys: earlier queries are as they were.
    one = jnp.zeros((B, LONG), jnp.int32)
    out, dq, *_ = both(q, poisoned(k, last), poisoned(v, last), one)
    assert finite(out[:, :, : 2 * size]) and finite(dq[:, :, : 2 * size]) and not finite(out[:, :, last])
    # A document that fills the first block of each sequence.
    segments = jnp.asarray(np.tile(np.arange(LONG) >= size, (B, 1)), jnp.int32)
    out, dq, dk, dv = both(poisoned(q, first), poisoned(k, first), poisoned(v, first), segments)
    assert all(finite(x[:, :, size:]) for x in (out, dq, dk, dv)) and not finite(out)
    # Keys of a cache that lie beyond the last query.
    some = jax.jit(lambda q, k, v: mla_attention(q, k, v, None, jnp.int32(BLOCK))[0])
    assert finite(some(q[:, :, :40], poisoned(k, last), poisoned(v, last)))


def attention_of(t, heads=4, k=192, v=128):
    """(function, shapes) of forward and backward at DeepSeek-V3's widths."""
    of = lambda width: jax.ShapeDtypeStruct((1, heads, t, width), jnp.float32)  # noqa: E731

    def both(q, k, v, dout):
        out, lse = mla_attention(q, k, v, implementation="xla")
        return out, mla_attention_backward(q, k, v, None, out, lse, dout, implementation="xla")

    return both, (of(k), of(k), of(v), of(v))


def test_work_is_half_of_the_square():
    """Products of 8 blocks, forward and backward: what a causal mask leaves and less than 4% beside it."""
    t = 8 * BLOCK
    fn, shapes = attention_of(t)
    least = 2 * (4 * 192 + 3 * 128)  # of a query and a key: scores twice, dq, dk; output, its gradient's, dv
    assert flops(jax.make_jaxpr(fn)(*shapes)) < 1.04 * least * 4 * t**2 / 2


def test_memory_grows_with_the_tokens():
    sizes = []
    for t in (4 * BLOCK, 8 * BLOCK):
        fn, shapes = attention_of(t)
        sizes.append(jax.jit(fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 2 * sizes[0]


def test_bad_operands_are_named():
    q, k, v = (jnp.zeros((2, 3, 8, width)) for width in (6, 6, 4))
    segments, lse = jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 3, 8))
    for call, message in (
        (lambda: mla_attention(q[0], k, v), r"are \[B, H, T, K\]"),
        (lambda: mla_attention(q, k, v[:, :, :5]), r"do not fit"),
        (lambda: mla_attention(q, v, v), r"one width"),
        (lambda: mla_attention(q, k, v.astype(jnp.bfloat16)), "all are bfloat16, or all float32"),
        (lambda: mla_attention(q[:, :, :3], k, v), "3 queries and 8 keys"),
        (lambda: mla_attention(q, k, v, segments, jnp.int32(0)), "exclude each other"),
        (lambda: mla_attention(q, k, v, None, jnp.zeros(3, jnp.int32)), r"q_offset has shape \[3\]"),
        (
            lambda: mla_attention(q, k, v, segments[:, :5]),
            r"segments is int32\[2, 5\], expected int32 \[2, 8\]",
        ),
        (lambda: mla_attention_backward(q, k, v, None, q, lse, v), "out has shape"),
        (lambda: mla_attention_backward(q, k, v, None, v, v, v), "lse has shape"),
        (lambda: mla_attention(q, k, v, implementation="mosaic"), "the kernel multiplies bfloat16"),
        (
            lambda: mla_attention(*[jnp.zeros((1, 1, 8, 256), jnp.bfloat16)] * 3, implementation="mosaic"),
            "head widths 256 and 256; the kernel has room for 192 and 128",
        ),
        (lambda: AttentionConfig(block_k=96), "block_k=96"),
        (lambda: AttentionConfig(stages=1), "stages=1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

"""Defines what is compiled and measured: an op on a shape, with its operands, its exact result and its peer.

Legend: G groups, M rows, N outputs, K contraction, T tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import ROW_TILE, SQUARE_BLOCK
from pallas_kernels.fp8_gemm import shapes as gemm_shapes
from pallas_kernels.fp8_gemm.ops import fp8_gemm
from pallas_kernels.fp8_gemm.shapes import GemmShape
from pallas_kernels.fp8_grouped_gemm import shapes as grouped_shapes
from pallas_kernels.fp8_grouped_gemm.ops import fp8_grouped_gemm, fp8_grouped_gemm_masked, fp8_grouped_wgrad
from pallas_kernels.fp8_grouped_gemm.shapes import GroupedShape
from pallas_kernels.grouped_gemm import shapes as bf16_grouped_shapes
from pallas_kernels.grouped_gemm.ops import grouped_gemm, grouped_wgrad
from pallas_kernels.mla_attention import shapes as attention_shapes
from pallas_kernels.mla_attention.ops import mla_attention, mla_attention_backward
from pallas_kernels.mla_attention.shapes import AttentionShape
from pallas_kernels.mla_decode import shapes as decode_shapes
from pallas_kernels.mla_decode.ops import mla_decode, quantize_cache
from pallas_kernels.mla_decode.shapes import DecodeShape
from pallas_kernels.quantize import ops as quantize_ops
from pallas_kernels.quantize import shapes as quantize_shapes
from pallas_kernels.quantize.ops import quantize
from pallas_kernels.quantize.shapes import QuantizeShape
from pallas_kernels.tiles import TileConfig

FP8_DIFF_BAND = (6.5e-4, 7.5e-4)  # Gaussian data, fine-grained FP8 against the unquantised product
BF16_DIFF_BAND = (0.0, 1e-5)
FP8_TFLOPS, BF16_TFLOPS = 1979.0, 989.5  # dense peaks of an H100 SXM
MEMORY_GB_S = 3350.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape of one op.

    Attributes:
      op, shape, options: arguments of `workload`.
      flops, bytes: of one call, each byte counted once.
      peak_tflops: of the tensor cores in its format; 0 for an op without products.
      make: seed -> source arrays.
      operands: source arrays -> operands of `run`.
      run: (*operands, implementation) -> output.
      exact: source arrays -> what an unquantised op gives, or None to compare with the XLA path bit by bit.
      peer: source arrays -> the same work by XLA and cuBLAS in BF16; of attention, the XLA path.
      band: where `calc_diff(run, exact)` must land.
      published_tflops: DeepGEMM or FlashMLA on one H800, as published.
    """

    op: str
    shape: Any
    options: dict
    flops: int
    bytes: int
    peak_tflops: float
    make: Callable
    operands: Callable
    run: Callable
    exact: Callable | None
    peer: Callable
    band: tuple[float, float] = FP8_DIFF_BAND
    published_tflops: float | None = None

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def bound_seconds(self) -> float:
        """Returns the roofline: the time that arithmetic or memory needs on an H100, whichever is longer."""
        arithmetic = self.flops / (self.peak_tflops * 1e12) if self.peak_tflops else 0.0
        return max(arithmetic, self.bytes / (MEMORY_GB_S * 1e9))

    @property
    def bound_by(self) -> str:
        return "memory" if self.bound_seconds == self.bytes / (MEMORY_GB_S * 1e9) else "compute"

    def program(self) -> tuple[Callable, tuple]:
        """Returns (the kernel as a function, shapes of its operands), to compile; a shape that the kernel refuses raises."""
        shapes = jax.eval_shape(lambda: self.operands(*self.make(0)))
        return lambda *operands: self.run(*operands, "mosaic"), shapes


def workload(op: str, shape: Any, **options: Any) -> Workload:
    """Builds the workload of `op` on `shape`.

    Args:
      op: a key of `workloads()`.
      shape: GemmShape, GroupedShape, QuantizeShape, AttentionShape or DecodeShape, or its fields as a dict.
      options: other arguments of the op, as JSON values: `config` (fields of TileConfig), `scale`, `transpose_b`.
    """
    kind, build = _OPS[op]
    shape = kind(**shape) if isinstance(shape, dict) else shape
    tiling = {"config": TileConfig(**options["config"])} if "config" in options else {}
    return Workload(op=op, shape=shape, options=options, **build(op, shape, **(options | tiling)))


def _normal(seed: int, *shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Draws Gaussian data in float32 and rounds to BF16: drawn in BF16 they would lack the largest values."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(
        jax.random.normal(key, shape).astype(jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )


def _products(equation: str, out_dtype) -> dict[str, Callable]:
    """Returns `exact` and `peer` of a product."""
    product = functools.partial(jnp.einsum, equation)
    return {
        "exact": functools.partial(product, preferred_element_type=jnp.float32),
        "peer": functools.partial(product, preferred_element_type=out_dtype),
    }


def _gemm(op: str, shape: GemmShape, **options: Any) -> dict[str, Any]:
    wgrad = shape.recipe == "1d1d"
    out_dtype = jnp.float32 if wgrad else jnp.bfloat16

    def operands(x, w):
        c = jnp.zeros((shape.m, shape.n), jnp.float32) if shape.accumulate else None
        return (*quantize(x), *quantize(w, ROW_TILE if wgrad else SQUARE_BLOCK), c)

    def run(a, a_scale, b, b_scale, c, implementation):
        return fp8_gemm(a, a_scale, b, b_scale, out_dtype, c, implementation, **options)

    return {
        "flops": shape.flops,
        "bytes": shape.bytes,
        "peak_tflops": FP8_TFLOPS,
        "make": lambda seed: _normal(seed, (shape.m, shape.k), (shape.n, shape.k)),
        "operands": operands,
        "run": run,
        "published_tflops": shape.peer_tflops,
        **_products("mk,nk->mn", out_dtype),
    }


_GROUPED: dict[tuple[str, str], Callable[..., jax.Array]] = {
    ("fp8_grouped_gemm", "contiguous"): fp8_grouped_gemm,
    ("fp8_grouped_gemm", "masked"): fp8_grouped_gemm_masked,
    ("fp8_grouped_gemm", "wgrad"): fp8_grouped_wgrad,
    ("grouped_gemm", "contiguous"): grouped_gemm,
    ("grouped_gemm", "wgrad"): grouped_wgrad,
}


def _grouped(op: str, shape: GroupedShape, **options: Any) -> dict[str, Any]:
    """Sources are rows [G, rows, K] and weights [G, N, K]; for a weight gradient [G, T, M] and [G, T, N]."""
    apply, fp8 = _GROUPED[op, shape.kind], op == "fp8_grouped_gemm"
    wgrad, masked = shape.kind == "wgrad", shape.kind == "masked"
    g, rows, (m, n, k) = shape.groups, shape.present_rows, (shape.m, shape.n, shape.k)
    sources = [(g, k, m), (g, k, n)] if wgrad else [(g, rows, k), (g, n, k)]

    def operands(x, w):
        if wgrad:
            pair = [t.reshape(g * k, -1) for t in (x, w)]
            if fp8:
                pair = [part for t in pair for part in quantize_ops.quantize_transposed(t)]
            c = jnp.zeros((g, m, n), jnp.float32) if shape.accumulate else None
            return (*pair, jnp.full((g,), k, jnp.int32), c)
        if masked:
            x = jnp.pad(x, ((0, 0), (0, m - rows), (0, 0)))
            groups = jnp.full((g,), rows, jnp.int32)
        else:
            x = x.reshape(g * m, k)
            groups = jnp.repeat(jnp.arange(g, dtype=jnp.int32), m)
        if fp8:
            return (*quantize(x), *quantize(w, SQUARE_BLOCK), groups)
        return x, w if options.get("transpose_b", True) else w.swapaxes(1, 2), groups

    def run(*operands_and_implementation: Any):
        *operands, implementation = operands_and_implementation
        out = apply(*operands, implementation=implementation, **options)
        return out[:, :rows] if masked else out.reshape(g, m, n)

    return {
        "flops": shape.flops,
        "bytes": shape.bytes(element=1 if fp8 else 2),
        "peak_tflops": FP8_TFLOPS if fp8 else BF16_TFLOPS,
        "make": lambda seed: _normal(seed, *sources),
        "operands": operands,
        "run": run,
        "band": FP8_DIFF_BAND if fp8 else BF16_DIFF_BAND,
        "published_tflops": shape.peer_tflops if fp8 else None,
        **_products("gtm,gtn->gmn" if wgrad else "gmk,gnk->gmn", jnp.float32 if wgrad else jnp.bfloat16),
    }


def _quantize(op: str, shape: QuantizeShape, **options: Any) -> dict[str, Any]:
    r, c = shape.rows, shape.cols
    swiglu = shape.op == "swiglu_quantize"
    if shape.op == "quantize":
        options["block"] = shape.block

    def operands(x):
        if shape.op == "requantize_transposed":
            return quantize(x)
        return (x, None, jnp.ones((r,), jnp.float32)) if swiglu else (x,)

    def run(*operands_and_implementation: Any):
        *operands, implementation = operands_and_implementation
        return getattr(quantize_ops, shape.op)(*operands, implementation=implementation, **options)

    return {
        "flops": 0,
        "bytes": shape.bytes,
        "peak_tflops": 0.0,
        "make": lambda seed: _normal(seed, (r, 2 * c if swiglu else c)),
        "operands": operands,
        "run": run,
        "exact": None,
        "peer": lambda x: run(*operands(x), "xla"),
    }


def _attention(op: str, shape: AttentionShape) -> dict[str, Any]:
    """Sources are q [B, H, T, K], k [B, H, S, K], v [B, H, S, V], and backward the gradient of the output."""
    b, h, t, s = shape.batch, shape.heads, shape.rows, shape.tokens
    backward = shape.pass_ == "backward"
    sources = [
        (b, h, t, shape.qk),
        (b, h, s, shape.qk),
        (b, h, s, shape.v),
        *([(b, h, t, shape.v)] * backward),
    ]

    def operands(q, k, v, *dout):
        documents = jnp.repeat(jnp.arange(shape.documents, dtype=jnp.int32), s // shape.documents)
        segments = jnp.broadcast_to(documents, (b, s)) if shape.documents > 1 else None
        q = q * jnp.asarray(shape.qk**-0.5, q.dtype)
        if not backward:
            return q, k, v, segments, None if t == s else jnp.int32(s - t)
        return q, k, v, segments, *mla_attention(q, k, v, segments, implementation="xla"), *dout

    def run(*operands_and_implementation):
        *operands, implementation = operands_and_implementation
        if backward:
            return mla_attention_backward(*operands, implementation=implementation)
        return mla_attention(*operands, implementation=implementation)[0]

    return {
        "flops": shape.flops,
        "bytes": shape.bytes,
        "peak_tflops": BF16_TFLOPS,
        "make": lambda seed: _normal(seed, *sources),
        "operands": operands,
        "run": run,
        "exact": lambda *xs: run(*operands(*(x.astype(jnp.float32) for x in xs)), "xla"),
        "peer": lambda *xs: run(*operands(*xs), "xla"),
        "band": BF16_DIFF_BAND,
    }


def _decode(op: str, shape: DecodeShape) -> dict[str, Any]:
    """Sources are queries [B, T, H, D] and keys [pages, 64, D] in the order of a shuffled block table."""
    per_sequence, d, scale = shape.length // 64, shape.latent + shape.rope, (128 + 64) ** -0.5
    pages, fp8 = shape.batch * per_sequence, shape.kind == "fp8"

    def operands(q, keys):
        cache = quantize_cache(keys, shape.latent) if fp8 else keys
        table = jax.random.permutation(jax.random.key(0), pages).reshape(shape.batch, per_sequence)
        return q, cache, table.astype(jnp.int32), jnp.full((shape.batch,), shape.length, jnp.int32)

    def run(*operands_and_implementation: Any):
        *operands, implementation = operands_and_implementation
        return mla_decode(*operands, scale=scale, latent=shape.latent, implementation=implementation)[0]

    def peer(q, keys):
        """The same products on keys in order, with all scores in memory."""
        keys = keys.reshape(shape.batch, shape.length, d)
        score = jnp.einsum("bthd,bsd->bhts", q, keys, preferred_element_type=jnp.float32) * scale
        return jnp.einsum("bhts,bsc->bhtc", jax.nn.softmax(score).astype(q.dtype), keys[..., : shape.latent])

    return {
        "flops": shape.flops,
        "bytes": shape.bytes,
        "peak_tflops": BF16_TFLOPS,
        "make": lambda seed: _normal(seed, (shape.batch, shape.queries, shape.heads, d), (pages, 64, d)),
        "operands": operands,
        "run": run,
        "exact": lambda q, keys: run(*operands(q, keys), "reference"),
        "peer": peer,
        "band": BF16_DIFF_BAND,
        "published_tflops": shape.peer_tflops,
    }


_OPS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "quantize": (QuantizeShape, _quantize),
    "fp8_gemm": (GemmShape, _gemm),
    "fp8_grouped_gemm": (GroupedShape, _grouped),
    "grouped_gemm": (GroupedShape, _grouped),
    "mla_attention": (AttentionShape, _attention),
    "mla_decode": (DecodeShape, _decode),
}


def workloads() -> dict[str, list[Workload]]:
    """Lists the workloads of every named shape, by op."""
    shapes = {
        "quantize": quantize_shapes.SHAPES,
        "fp8_gemm": gemm_shapes.SHAPES,
        "fp8_grouped_gemm": grouped_shapes.SHAPES,
        "mla_attention": attention_shapes.SHAPES,
        "mla_decode": decode_shapes.SHAPES,
    }
    found = {op: [workload(op, shape) for shape in shapes[op]] for op in shapes}
    # In BF16 both passes read the weight as it is, [in, out].
    as_stored = [(s, {"transpose_b": False} if s.is_fprop else {}) for s in bf16_grouped_shapes.SHAPES]
    return found | {"grouped_gemm": [workload("grouped_gemm", s, **options) for s, options in as_stored]}

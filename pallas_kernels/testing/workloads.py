"""What the benchmark runs: every named shape of every op, with its operands, its exact result and its peer.

Legend: G groups, M rows, N outputs, K contraction, T tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import SQUARE_BLOCK
from pallas_kernels.fp8_gemm import shapes as gemm_shapes
from pallas_kernels.fp8_gemm.ops import fp8_gemm
from pallas_kernels.fp8_grouped_gemm import shapes as grouped_shapes
from pallas_kernels.fp8_grouped_gemm.ops import fp8_grouped_gemm, fp8_grouped_gemm_masked, fp8_grouped_wgrad
from pallas_kernels.grouped_gemm.ops import grouped_gemm, grouped_wgrad
from pallas_kernels.quantize import ops as quantize_ops
from pallas_kernels.quantize import shapes as quantize_shapes

FP8_DIFF_BAND = (6.5e-4, 7.5e-4)  # Gaussian data, fine-grained FP8 against the unquantised product
BF16_DIFF_BAND = (0.0, 1e-5)
FP8_TFLOPS, BF16_TFLOPS = 1979.0, 989.5  # dense peaks of an H100 SXM
MEMORY_GB_S = 3350.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape of one op.

    Attributes:
      op, name: of the op and of the shape.
      case: function of `testing.cases` and its arguments, for compilation.
      flops, bytes: of one call, each byte counted once.
      peak_tflops: of the tensor cores in its format; 0 for an op without products.
      make: seed -> source arrays.
      operands: source arrays -> operands of `run`.
      run: (*operands, implementation) -> output.
      exact: source arrays -> what an unquantised op gives, or None to compare with the XLA path bit by bit.
      peer: source arrays -> the same work by XLA and cuBLAS in BF16.
      band: where `calc_diff(run, exact)` must land.
      published_tflops: DeepGEMM on one H800, as published.
    """

    op: str
    name: str
    case: tuple[str, dict]
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
    def bound_seconds(self) -> float:
        """Roofline: the time that arithmetic or memory needs on an H100, whichever is longer."""
        arithmetic = self.flops / (self.peak_tflops * 1e12) if self.peak_tflops else 0.0
        return max(arithmetic, self.bytes / (MEMORY_GB_S * 1e9))

    @property
    def bound_by(self) -> str:
        return "memory" if self.bound_seconds == self.bytes / (MEMORY_GB_S * 1e9) else "compute"


def _normal(seed: int, *shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Gaussian data in BF16, drawn in float32: drawn in BF16 its tails are cut, and with them the largest values."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(
        jax.random.normal(key, shape).astype(jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )


def _gemm(shape: gemm_shapes.GemmShape) -> Workload:
    wgrad = shape.recipe == "1d1d"
    out_dtype = jnp.float32 if wgrad else jnp.bfloat16

    def operands(x, w):
        b = quantize_ops.quantize(w) if wgrad else quantize_ops.quantize(w, SQUARE_BLOCK)
        c = jnp.zeros((shape.m, shape.n), jnp.float32) if shape.accumulate else None
        return (*quantize_ops.quantize(x), *b, c)

    def run(a, a_scale, b, b_scale, c, implementation):
        return fp8_gemm(a, a_scale, b, b_scale, out_dtype, c, implementation)

    def product(x, w, dtype):
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

    return Workload(
        op="fp8_gemm",
        name=shape.name,
        case=("fp8_gemm", {f: getattr(shape, f) for f in ("m", "n", "k", "recipe", "accumulate")}),
        flops=shape.flops,
        bytes=shape.bytes,
        peak_tflops=FP8_TFLOPS,
        make=lambda seed: _normal(seed, (shape.m, shape.k), (shape.n, shape.k)),
        operands=operands,
        run=run,
        exact=functools.partial(product, dtype=jnp.float32),
        peer=functools.partial(product, dtype=out_dtype),
        published_tflops=shape.peer_tflops,
    )


def _grouped_make(shape: grouped_shapes.GroupedShape) -> Callable:
    """Rows [G, rows, K] and weights [G, N, K]; for a weight gradient [G, T, M] and [G, T, N]."""
    g, rows = shape.groups, shape.present_rows
    if shape.kind == "wgrad":
        return lambda seed: _normal(seed, (g, shape.k, shape.m), (g, shape.k, shape.n))
    return lambda seed: _normal(seed, (g, rows, shape.k), (g, shape.n, shape.k))


def _grouped_product(shape: grouped_shapes.GroupedShape, dtype) -> Callable:
    equation = "gtm,gtn->gmn" if shape.kind == "wgrad" else "gmk,gnk->gmn"
    return functools.partial(jnp.einsum, equation, preferred_element_type=dtype)


def _rows(shape: grouped_shapes.GroupedShape, group: int) -> jax.Array:
    return jnp.repeat(jnp.arange(shape.groups, dtype=jnp.int32), group)


FP8_GROUPED: dict[str, Callable[..., jax.Array]] = {
    "contiguous": fp8_grouped_gemm,
    "masked": fp8_grouped_gemm_masked,
    "wgrad": fp8_grouped_wgrad,
}


def _fp8_grouped(shape: grouped_shapes.GroupedShape) -> Workload:
    apply = FP8_GROUPED[shape.kind]
    g, (m, n, k) = shape.groups, (shape.m, shape.n, shape.k)
    sizes = jnp.full((g,), k if shape.kind == "wgrad" else shape.present_rows, jnp.int32)
    wgrad = shape.kind == "wgrad"

    def operands(x, w):
        if wgrad:
            pairs = [quantize_ops.quantize_transposed(t.reshape(g * k, -1)) for t in (x, w)]
            return (*pairs[0], *pairs[1], sizes)
        if shape.kind == "masked":
            x = jnp.pad(x, ((0, 0), (0, m - shape.present_rows), (0, 0)))
            return (*quantize_ops.quantize(x), *quantize_ops.quantize(w, SQUARE_BLOCK), sizes)
        return (
            *quantize_ops.quantize(x.reshape(g * m, k)),
            *quantize_ops.quantize(w, SQUARE_BLOCK),
            _rows(shape, m),
        )

    def run(*operands_and_implementation: Any):
        *operands, implementation = operands_and_implementation
        out = apply(*operands, implementation=implementation)
        if shape.kind == "masked":
            return out[:, : shape.present_rows]
        return out if wgrad else out.reshape(g, m, n)

    return Workload(
        op="fp8_grouped_gemm",
        name=shape.name,
        case=(apply.__name__, {"groups": g, "m": m, "n": n, "k": k}),
        flops=shape.flops,
        bytes=shape.bytes(),
        peak_tflops=FP8_TFLOPS,
        make=_grouped_make(shape),
        operands=operands,
        run=run,
        exact=_grouped_product(shape, jnp.float32),
        peer=_grouped_product(shape, jnp.float32 if wgrad else jnp.bfloat16),
        published_tflops=shape.peer_tflops,
    )


def _bf16_grouped(shape: grouped_shapes.GroupedShape, transpose_b: bool = True) -> Workload:
    g, (m, n, k) = shape.groups, (shape.m, shape.n, shape.k)
    wgrad = shape.kind == "wgrad"

    def operands(x, w):
        if wgrad:
            return x.reshape(g * k, m), w.reshape(g * k, n), jnp.full((g,), k, jnp.int32)
        return x.reshape(g * m, k), w if transpose_b else w.swapaxes(1, 2), _rows(shape, m)

    def run(a, b, groups, implementation):
        if wgrad:
            return grouped_wgrad(a, b, groups, implementation=implementation)
        return grouped_gemm(a, b, groups, transpose_b, implementation=implementation).reshape(g, m, n)

    arguments = {"groups": g, "m": m, "n": n, "k": k}
    return Workload(
        op="grouped_gemm",
        name=shape.name if transpose_b else f"{shape.name}_dgrad",
        case=("grouped_wgrad", arguments)
        if wgrad
        else ("grouped_gemm", arguments | {"transpose_b": transpose_b}),
        flops=shape.flops,
        bytes=shape.bytes(element=2),
        peak_tflops=BF16_TFLOPS,
        make=_grouped_make(shape),
        operands=operands,
        run=run,
        exact=_grouped_product(shape, jnp.float32),
        peer=_grouped_product(shape, jnp.float32 if wgrad else jnp.bfloat16),
        band=BF16_DIFF_BAND,
    )


def _quantize(shape: quantize_shapes.QuantizeShape) -> Workload:
    r, c = shape.rows, shape.cols
    swiglu = shape.op == "swiglu_quantize"
    arguments: dict[str, Any] = {"m": r, "f": c} if swiglu else {"t": r, "k": c}
    if shape.op == "quantize":
        arguments = {"m": r, "k": c, "block": shape.block}

    def operands(x):
        if shape.op == "requantize_transposed":
            return quantize_ops.quantize(x)
        return (x, jnp.ones((r,), jnp.float32)) if swiglu else (x,)

    def run(*operands_and_implementation: Any):
        *operands, implementation = operands_and_implementation
        if shape.op == "quantize":
            return quantize_ops.quantize(operands[0], shape.block, implementation=implementation)
        if swiglu:
            return quantize_ops.swiglu_quantize(
                operands[0], routing_weight=operands[1], implementation=implementation
            )
        return getattr(quantize_ops, shape.op)(*operands, implementation=implementation)

    return Workload(
        op="quantize",
        name=shape.name,
        case=(shape.op, arguments),
        flops=0,
        bytes=shape.bytes,
        peak_tflops=0.0,
        make=lambda seed: _normal(seed, (r, 2 * c if swiglu else c)),
        operands=operands,
        run=run,
        exact=None,
        peer=lambda x: run(*operands(x), "xla"),
    )


def workloads() -> dict[str, list[Workload]]:
    """Every workload, by op."""
    trained = [s for s in grouped_shapes.SHAPES if s.kind != "masked"]
    dgrad = [s for s in trained if s.kind == "contiguous"]
    return {
        "quantize": [_quantize(s) for s in quantize_shapes.SHAPES],
        "fp8_gemm": [_gemm(s) for s in gemm_shapes.SHAPES],
        "fp8_grouped_gemm": [_fp8_grouped(s) for s in grouped_shapes.SHAPES],
        "grouped_gemm": [*map(_bf16_grouped, trained), *(_bf16_grouped(s, transpose_b=False) for s in dgrad)],
    }

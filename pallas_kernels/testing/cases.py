"""Programs to compile for H100, named for `testing.aot`: each function returns (callable, operand shapes).

They ask for `implementation="mosaic"`, so that a shape that the kernel refuses fails here instead of falling back.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import cdiv
from pallas_kernels.fp8_gemm.ops import fp8_gemm as fp8_gemm_op
from pallas_kernels.fp8_grouped_gemm import ops as fp8_grouped_ops
from pallas_kernels.grouped_gemm import ops as grouped_ops
from pallas_kernels.matmul import TileConfig
from pallas_kernels.quantize import ops as quantize_ops

E4M3, BF16, F32, I32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32, jnp.int32


def _struct(*shape_and_dtype) -> jax.ShapeDtypeStruct:
    *shape, dtype = shape_and_dtype
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _config(config: dict | None) -> TileConfig | None:
    return None if config is None else TileConfig(**config)


def fp8_gemm(m, n, k, recipe="1d2d", accumulate=False, config=None):
    kb = cdiv(k, 128)
    b_scale = _struct(n, kb, F32) if recipe == "1d1d" else _struct(cdiv(n, 128), kb, F32)
    shapes = [_struct(m, k, E4M3), _struct(m, kb, F32), _struct(n, k, E4M3), b_scale]
    out_dtype = F32 if recipe == "1d1d" else BF16
    run = functools.partial(fp8_gemm_op, out_dtype=out_dtype, implementation="mosaic", config=_config(config))
    if not accumulate:
        return run, shapes
    return lambda a, sa, b, sb, c: run(a, sa, b, sb, accumulate=c), [*shapes, _struct(m, n, F32)]


def fp8_grouped_gemm(groups, m, n, k, config=None):
    rows, kb = groups * m, cdiv(k, 128)
    run = functools.partial(fp8_grouped_ops.fp8_grouped_gemm, implementation="mosaic", config=_config(config))
    weight = [_struct(groups, n, k, E4M3), _struct(groups, cdiv(n, 128), kb, F32)]
    return run, [_struct(rows, k, E4M3), _struct(rows, kb, F32), *weight, _struct(rows, I32)]


def fp8_grouped_gemm_masked(groups, m, n, k, config=None):
    kb = cdiv(k, 128)
    run = functools.partial(
        fp8_grouped_ops.fp8_grouped_gemm_masked, implementation="mosaic", config=_config(config)
    )
    weight = [_struct(groups, n, k, E4M3), _struct(groups, cdiv(n, 128), kb, F32)]
    return run, [_struct(groups, m, k, E4M3), _struct(groups, m, kb, F32), *weight, _struct(groups, I32)]


def fp8_grouped_wgrad(groups, m, n, k, config=None):
    t = groups * k
    run = functools.partial(
        fp8_grouped_ops.fp8_grouped_wgrad, implementation="mosaic", config=_config(config)
    )
    operands = [
        _struct(m, t, E4M3),
        _struct(m, t // 128, F32),
        _struct(n, t, E4M3),
        _struct(n, t // 128, F32),
    ]
    return run, [*operands, _struct(groups, I32), _struct(groups, m, n, F32)]


def grouped_gemm(groups, m, n, k, transpose_b=True, config=None):
    run = functools.partial(
        grouped_ops.grouped_gemm, transpose_b=transpose_b, implementation="mosaic", config=_config(config)
    )
    b = _struct(groups, n, k, BF16) if transpose_b else _struct(groups, k, n, BF16)
    return run, [_struct(groups * m, k, BF16), b, _struct(groups * m, I32)]


def grouped_wgrad(groups, m, n, k, config=None):
    t = groups * k
    run = functools.partial(grouped_ops.grouped_wgrad, implementation="mosaic", config=_config(config))
    return run, [_struct(t, m, BF16), _struct(t, n, BF16), _struct(groups, I32), _struct(groups, m, n, F32)]


def quantize(m, k, block, scale="fp32", dtype="bfloat16"):
    run = functools.partial(quantize_ops.quantize, block=tuple(block), scale=scale, implementation="mosaic")
    return run, [_struct(m, k, jnp.dtype(dtype))]


def swiglu_quantize(m, f, scale="fp32"):
    def run(gate_up, weight):
        return quantize_ops.swiglu_quantize(
            gate_up, routing_weight=weight, scale=scale, implementation="mosaic"
        )

    return run, [_struct(m, 2 * f, BF16), _struct(m, F32)]


def quantize_transposed(t, k, scale="fp32"):
    run = functools.partial(quantize_ops.quantize_transposed, scale=scale, implementation="mosaic")
    return run, [_struct(t, k, BF16)]


def requantize_transposed(t, k, scale="fp32"):
    run = functools.partial(quantize_ops.requantize_transposed, scale=scale, implementation="mosaic")
    return run, [_struct(t, k, E4M3), _struct(t, cdiv(k, 128), F32)]

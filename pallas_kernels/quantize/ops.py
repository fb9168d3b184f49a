"""Public functions of FP8 quantisation: `quantize`, `dequantize` and the fusions training needs.

Legend: M rows (tokens), K columns (channels), F expert intermediate channels, T tokens contracted by a weight gradient.
DeepSeek-V3 report, section 3.3.2 (formats, blocks, online scales) and 3.5.2 (fused SwiGLU and cast, transposed cast).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import COLUMN_TILE, ROW_TILE, SQUARE_BLOCK, Block, check_quantized
from pallas_kernels.dispatch import dispatch
from pallas_kernels.quantize import fallback, kernel, reference
from pallas_kernels.quantize.reference import SCALE_FORMATS

BLOCKS = (ROW_TILE, COLUMN_TILE, SQUARE_BLOCK)
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def quantize(
    x: jax.Array, block: Block = ROW_TILE, scale: str = "fp32", implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Quantises to E4M3 with one scale per block, so that `x ~= q * s`.

    Args:
      x: [..., M, K] bfloat16, float16 or float32.
      block: (1, 128), (128, 1) or (128, 128) over the last two dims; ragged edges act as zero-padded blocks.
      scale: "fp32", or "ue8m0" for scales rounded up to a power of two (still stored as float32).
      implementation: None (by platform), "mosaic", "xla" or "reference".

    Returns:
      q [..., M, K] float8_e4m3fn and s [..., ceil(M/bm), ceil(K/bk)] float32. Infinities and NaN
      dequantise to NaN, an infinity with its whole block.
    """
    _check("quantize", x=x)
    block = _check_block(block)
    _check_scale(scale)
    return dispatch(
        "quantize",
        implementation,
        x,
        mosaic=functools.partial(kernel.quantize, block=block, scale=scale),
        **_portable(scale, block, lambda module, x: x),
        unsupported=kernel.unsupported(x.shape, x.dtype),
    )


def dequantize(
    q: jax.Array,
    scale: jax.Array,
    block: Block = ROW_TILE,
    dtype=jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Returns q * scale in `dtype`, computed in float32: the inverse of `quantize` up to its rounding.

    It has no kernel: XLA fuses an elementwise product with its consumer.
    """
    block = _check_block(block)
    check_quantized("dequantize", "q", q, scale, None, block)
    if implementation == "reference":
        return reference.dequantize(q, scale, block).astype(dtype)
    if implementation not in (None, "xla"):
        raise ValueError(f"dequantize: implementation={implementation!r}; use None, 'xla' or 'reference'")
    return fallback.dequantize(q, scale, block).astype(dtype)


def swiglu_quantize(
    gate_up: jax.Array,
    up: jax.Array | None = None,
    routing_weight: jax.Array | None = None,
    scale: str = "fp32",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Quantises `silu(gate) * up * routing_weight` in 1x128 tiles, in one pass over its inputs.

    Args:
      gate_up: [..., M, 2F] with the gate in the first half, or the gate alone [..., M, F] if `up` is given.
      up: [..., M, F] or None.
      routing_weight: [..., M] or None. Applied here, before the down projection, and then never again.
      scale, implementation: as in `quantize`.

    Returns:
      q [..., M, F] float8_e4m3fn, s [..., M, ceil(F/128)] float32; the product is formed in float32.
    """
    _check("swiglu_quantize", gate_up=gate_up, **({} if up is None else {"up": up}))
    _check_scale(scale)
    if up is None and gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu_quantize: gate_up has {gate_up.shape[-1]} columns, gate and up need an even number"
        )
    if up is not None and up.shape != gate_up.shape:
        raise ValueError(
            f"swiglu_quantize: gate has shape {gate_up.shape} and up {up.shape}; they must be equal"
        )
    if routing_weight is not None and routing_weight.shape != gate_up.shape[:-1]:
        raise ValueError(
            f"swiglu_quantize: routing_weight has shape {routing_weight.shape}, expected {gate_up.shape[:-1]}"
        )

    def product(module, gate_up, up, routing_weight):
        gate, up = jnp.split(gate_up, 2, axis=-1) if up is None else (gate_up, up)
        return reference.swiglu(gate, up, routing_weight)

    return dispatch(
        "swiglu_quantize",
        implementation,
        gate_up,
        up,
        routing_weight,
        mosaic=functools.partial(kernel.swiglu_quantize, scale=scale),
        **_portable(scale, ROW_TILE, product),
        unsupported=kernel.unsupported(gate_up.shape, gate_up.dtype),
    )


def quantize_transposed(
    x: jax.Array, scale: str = "fp32", implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Quantises 128x1 tiles of x and transposes: the operand of a weight gradient, contracted over its last dim.

    Args:
      x: [..., T, K] bfloat16, float16 or float32.

    Returns:
      q [..., K, T] float8_e4m3fn, s [..., K, ceil(T/128)] float32, equal to `quantize(swapaxes(x, -1, -2))`.
    """
    _check("quantize_transposed", x=x)
    _check_scale(scale)
    return dispatch(
        "quantize_transposed",
        implementation,
        x,
        mosaic=functools.partial(kernel.quantize_transposed, scale=scale),
        **_portable(scale, ROW_TILE, lambda module, x: jnp.swapaxes(x, -1, -2)),
        unsupported=kernel.transposed_unsupported(x.shape, x.dtype),
    )


def requantize_transposed(
    q: jax.Array, q_scale: jax.Array, scale: str = "fp32", implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Dequantises 1x128 tiles that the forward pass saved, transposes and quantises them again for the weight gradient.

    Args:
      q, q_scale: [..., T, K] float8_e4m3fn and [..., T, ceil(K/128)] float32 of `quantize(x, (1, 128))`.

    Returns:
      q [..., K, T] float8_e4m3fn, s [..., K, ceil(T/128)] float32 (128x1 tiles of x, transposed).
    """
    check_quantized("requantize_transposed", "q", q, q_scale, None, ROW_TILE)
    _check_scale(scale)

    def transposed(module, q, q_scale):
        return jnp.swapaxes(module.dequantize(q, q_scale, ROW_TILE), -1, -2)

    return dispatch(
        "requantize_transposed",
        implementation,
        q,
        q_scale,
        mosaic=functools.partial(kernel.requantize_transposed, scale=scale),
        **_portable(scale, ROW_TILE, transposed),
        unsupported=kernel.transposed_unsupported(q.shape, q.dtype),
    )


def _portable(scale: str, block: Block, prepare: Callable[..., jax.Array]) -> dict[str, Callable]:
    """Returns the two implementations without a kernel: each quantises what `prepare` makes with it of the operands."""

    def through(module):
        return lambda *operands: module.quantize(prepare(module, *operands), block, scale)

    return {"xla": through(fallback), "reference": through(reference)}


def _check(op: str, **arrays: jax.Array) -> None:
    for name, x in arrays.items():
        if x.ndim < 2:
            raise ValueError(f"{op}: {name} has shape {x.shape}; it needs at least two dims")
        if x.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} is {x.dtype}; cast it to bfloat16, float16 or float32")


def _check_block(block: Block) -> Block:
    if tuple(block) not in BLOCKS:
        raise ValueError(f"block={block} is not supported; use one of {BLOCKS}")
    return tuple(block)  # type: ignore[return-value]


def _check_scale(scale: str) -> None:
    if scale not in SCALE_FORMATS:
        raise ValueError(f"scale={scale!r} is unknown; use one of {SCALE_FORMATS}")

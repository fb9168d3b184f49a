"""DeepSeek's FP8 weight layout: e4m3 values and one float32 multiplier per block of 128 x 128.

w = q * scale; `scale` is what the checkpoints call weight_scale_inv. Blocks at the edges are filled with zeros
to 128 before scaling, then cut. UE8M0 scales (V3.1) are powers of two, rounded up. Source: README_WEIGHTS of
the released model; report section 3.3.2.

Dims: o out, i in; both of a checkpoint's [out, in] matrix.
"""

import ml_dtypes
import numpy as np

from pallas_kernels.blocks import BLOCK
from pallas_kernels.quantize.reference import AMAX_FLOOR, E4M3_MAX

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_STRIP = 8  # rows of blocks that are in float32 at once


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of an [out, in] matrix."""
    rows, cols = shape
    return -(-rows // BLOCK), -(-cols // BLOCK)


def block_scales(w_oi: np.ndarray, scale: str = "fp32") -> np.ndarray:
    """float32 [ceil(o / 128), ceil(i / 128)] for any float [o, i]; `scale` is "fp32" or "ue8m0".

    Raises ValueError for values that are not finite.
    """
    scales = np.empty(scale_shape(w_oi.shape), np.float32)
    for block_row, start in enumerate(range(0, w_oi.shape[0], BLOCK)):
        amax = np.abs(np.asarray(w_oi[start : start + BLOCK], np.float32)).max(0)
        scales[block_row] = np.pad(amax, (0, -len(amax) % BLOCK)).reshape(-1, BLOCK).max(-1)
    if not np.isfinite(scales).all():
        raise ValueError("cannot quantise to FP8: the matrix holds values that are not finite")
    scales[:] = np.maximum(scales, np.float32(AMAX_FLOOR)) / np.float32(E4M3_MAX)
    if scale == "ue8m0":  # the smallest power of two above, from the bits, not through a rounded logarithm
        mantissa, exponent = np.frexp(scales)  # scales = mantissa * 2**exponent, mantissa in [0.5, 1)
        scales = np.ldexp(np.float32(1.0), exponent - (mantissa == 0.5)).astype(np.float32)
    return scales


def checked_scales(scales: np.ndarray, name: str) -> np.ndarray:
    """Scales as a checkpoint stores them, in float32. Raises ValueError naming the tensor: NaN, infinite, negative."""
    scales = np.array(scales, np.float32)
    wrong = scales[~(np.isfinite(scales) & (scales >= 0))]
    if wrong.size:
        raise ValueError(f"{name} is damaged: {wrong.size} of its {scales.size} scales are as {wrong[0]}")
    return scales


def quantise(w_oi: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """w / scale of its block, rounded to float8_e4m3fn [o, i]."""
    q_oi = np.empty(w_oi.shape, E4M3)
    for block_row, start in enumerate(range(0, w_oi.shape[0], BLOCK)):
        per_col = np.repeat(scales[block_row], BLOCK)[: w_oi.shape[1]]
        ratio = np.asarray(w_oi[start : start + BLOCK], np.float32) / per_col
        q_oi[start : start + BLOCK] = np.clip(ratio, -E4M3_MAX, E4M3_MAX).astype(E4M3)
    return q_oi


def dequantise(
    q_oi: np.ndarray, scales: np.ndarray, dtype: np.dtype, first_row: int = 0, first_col: int = 0
) -> np.ndarray:
    """q * scale in float32, rounded to `dtype`.

    `q_oi` may be a window of the matrix that begins at (first_row, first_col); `scales` are the whole matrix's.
    """
    out = np.empty(q_oi.shape, dtype)
    rows, cols = q_oi.shape
    per_col = np.arange(first_col, first_col + cols) // BLOCK
    step = _STRIP * BLOCK
    for start in range(0, rows, step):
        strip = q_oi[start : start + step].astype(np.float32)
        per_row = np.arange(first_row + start, first_row + start + len(strip)) // BLOCK
        out[start : start + step] = strip * scales[per_row][:, per_col]
    return out

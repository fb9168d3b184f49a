"""GEMMs in NumPy float64 on operands decoded by `float8_oracle`, and the data the GEMM tests share."""

import float8_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blocks import ROW_TILE
from pallas_kernels.quantize.ops import quantize
from pallas_kernels.tiles import TileConfig

# Two "SMs" and few stages: the interpreter then walks several tiles per SM and wraps around the pipeline's slots.
SMALL = {"stages": 2, "num_sms": 2}


def small(**tile) -> TileConfig:
    return TileConfig(**(SMALL | tile))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def quantized(seed: int, shape: tuple[int, ...], block=ROW_TILE):
    """(q, s) of Gaussian data and its exact value in float64."""
    q, s = quantize(normal(seed, *shape), block, implementation="xla")
    return q, s, oracle.dequantize(q, s, block)


def product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a @ b.T and the sum of absolute products."""
    return a @ b.T, np.abs(a) @ np.abs(b).T


def contiguous(a, b, ids) -> tuple[np.ndarray, np.ndarray]:
    """Row i times the matrix of its group: a [M, K], b [G, N, K], ids [M]; zero where the id is -1."""
    out = np.zeros((a.shape[0], b.shape[1]))
    magnitude = np.zeros_like(out)
    for i, g in enumerate(np.asarray(ids)):
        if g >= 0:
            out[i], magnitude[i] = a[i] @ b[g].T, np.abs(a[i]) @ np.abs(b[g]).T
    return out, magnitude


def wgrad(a, b, sizes, accumulate=None) -> tuple[np.ndarray, np.ndarray]:
    """a [M, T], b [N, T]: a @ b.T over each group's range of T."""
    outs, magnitudes, start = [], [], 0
    for size in np.asarray(sizes):
        part = slice(start, start + int(size))
        out, magnitude = product(a[:, part], b[:, part])
        outs.append(out)
        magnitudes.append(magnitude)
        start += int(size)
    out, magnitude = np.stack(outs), np.stack(magnitudes)
    if accumulate is None:
        return out, magnitude
    accumulate = np.asarray(accumulate, np.float64)
    return out + accumulate, magnitude + np.abs(accumulate)

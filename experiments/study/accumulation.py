"""Models how a Hopper tensor core adds up (report section 3.3.2; "Insights into DeepSeek-V3", section 3.1.1).

An FP8 wgmma aligns 32 products to the largest of them and keeps 13 fraction bits of each; their sum is added to a
register with 13 mantissa bits. Promotion empties that register into float32 every 128 of the contraction. This NumPy
code is exact in what it models, and slow.
"""

import numpy as np

INSTRUCTION = 32  # contraction of one FP8 wgmma
FRACTION_BITS = 13


def _exponent(x: np.ndarray) -> np.ndarray:
    """Returns floor(log2 |x|), and the smallest exponent for zero."""
    return np.where(x == 0, -126, np.frexp(x)[1] - 1)


def _cut(x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Cuts off the bits of x below 2^(exponent - 13), towards zero."""
    step = np.exp2(exponent - float(FRACTION_BITS))
    return np.trunc(x / step) * step


def tensor_core_product(a: np.ndarray, b: np.ndarray, promote_every: int | None = 128) -> np.ndarray:
    """a [M, K] @ b [N, K].T as the tensor core adds it up, float32.

    a, b: E4M3 values as floats, K a multiple of 32. promote_every: contraction between two promotions, a multiple
    of 32, or None for one accumulator from end to end.
    """
    k = a.shape[1]
    every = promote_every or k
    if k % INSTRUCTION or every % INSTRUCTION:
        raise ValueError(f"K={k} and promote_every={promote_every} must be multiples of {INSTRUCTION}")
    total = np.zeros((a.shape[0], b.shape[0]), np.float32)
    register = np.zeros(total.shape)
    for start in range(0, k, INSTRUCTION):
        part = slice(start, start + INSTRUCTION)
        products = a[:, None, part].astype(np.float64) * b[None, :, part]
        top = _exponent(np.abs(products).max(-1))
        register = register + _cut(products, top[..., None]).sum(-1)
        register = _cut(register, _exponent(register))
        if (start + INSTRUCTION) % every == 0 or start + INSTRUCTION == k:
            total += register.astype(np.float32)
            register = np.zeros(total.shape)
    return total

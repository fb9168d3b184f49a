"""Float8 E4M3 in NumPy, written from the format's definition and on its own: no float8 type of any library.

One byte: sign, 4 exponent bits (bias 7), 3 mantissa bits. Exponent 0 is subnormal with spacing 2^-9. The all-ones
exponent holds ordinary numbers up to 448; only the byte 0x7F (0xFF) is NaN, and there is no infinity.
"""

import numpy as np

BLOCK = 128


def _value(byte: int) -> float:
    exponent, mantissa = (byte >> 3) & 0xF, byte & 0x7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return float("nan") if byte & 0x7F == 0x7F else -magnitude if byte & 0x80 else magnitude


VALUES = np.array([_value(byte) for byte in range(256)])
MAGNITUDES = VALUES[:0x7F]  # ascending: byte order is value order
MIDPOINTS = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2  # exact in float64


def decode(q) -> np.ndarray:
    """float8_e4m3fn array (or its bytes) -> float64."""
    return VALUES[np.asarray(q).view(np.uint8)]


def encode(y: np.ndarray) -> np.ndarray:
    """float32 -> bytes: nearest value, ties to the even mantissa; beyond 464 (448 and half a step) and NaN -> NaN."""
    magnitude = np.abs(y.astype(np.float64))
    below = np.searchsorted(MIDPOINTS, magnitude, side="left")  # a tie goes down ...
    tie = (below < MIDPOINTS.size) & (magnitude == MIDPOINTS[np.minimum(below, MIDPOINTS.size - 1)])
    byte = np.where(tie & (below % 2 == 1), below + 1, below)  # ... unless the lower mantissa is odd
    byte = np.where((magnitude > 464) | np.isnan(magnitude), 0x7F, byte).astype(np.uint8)
    return byte | (np.signbit(y).astype(np.uint8) << 7)


POWERS_OF_TWO = 2.0 ** np.arange(-126, 128)


def power_of_two_above(s: np.float32) -> np.float32:
    """Smallest power of two that is not below s, by comparison."""
    return np.float32(POWERS_OF_TWO[np.searchsorted(POWERS_OF_TWO, np.float64(s))])


def quantize(x, block: tuple[int, int], scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Matrix -> (bytes, float32 scales), block by block, in the float32 arithmetic of DeepSeek's inference code."""
    x = np.asarray(x).astype(np.float32)
    rows, cols = x.shape
    q = np.zeros((rows, cols), np.uint8)
    s = np.zeros((-(-rows // block[0]), -(-cols // block[1])), np.float32)
    with np.errstate(invalid="ignore"):  # infinity over infinity is the NaN we want
        for i in range(s.shape[0]):
            for j in range(s.shape[1]):
                part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                amax = np.maximum(np.max(np.abs(x[part])), np.float32(1e-4))
                s[i, j] = amax / np.float32(448)
                if scale == "ue8m0" and np.isfinite(s[i, j]):
                    s[i, j] = power_of_two_above(s[i, j])
                q[part] = encode(x[part] / s[i, j])
    return q, s


def dequantize(q, s, block: tuple[int, int]) -> np.ndarray:
    """float8 array and scales -> float64 matrix (or stack of matrices)."""
    q, s = decode(q), np.asarray(s, np.float64)
    full = np.repeat(np.repeat(s, block[0], -2), block[1], -1)
    return q * full[..., : q.shape[-2], : q.shape[-1]]

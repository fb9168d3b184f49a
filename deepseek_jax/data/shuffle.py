"""Seeded permutations of the numbers below n that are computed, not stored: element i alone costs nothing else.

A Feistel network permutes the numbers of an even number of bits, for any round function; numbers that fall outside
[0, n) are permuted again until they fall inside ("cycle walking"), at most about four times on average. Everything is
uint64: a corpus may have more documents than 32 bits count.
"""

import numpy as np

_ROUNDS = 6


def permuted(index_n: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """The elements, int64 [n], at the places `index_n` of the permutation of range(size) that `key` names.

    Args:
        index_n: int64 [n], places inside [0, size).
        size: below 2^62.
        key: non-negative integers.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.random.default_rng(key).integers(0, 1 << 64, size=_ROUNDS, dtype=np.uint64)
    out_n = _feistel(index_n.astype(np.uint64), half, keys)
    while len(outside := np.flatnonzero(out_n >= size)):
        out_n[outside] = _feistel(out_n[outside], half, keys)
    return out_n.astype(np.int64)


def _feistel(x_n: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left_n, right_n = x_n >> bits, x_n & mask
    for key in keys:
        left_n, right_n = right_n, left_n ^ (_mix(right_n ^ key) & mask)
    return (left_n << bits) | right_n


def _mix(x_n: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the argument."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x_n = (x_n ^ (x_n >> np.uint64(shift))) * np.uint64(factor)
    return x_n ^ (x_n >> np.uint64(31))

"""Causal attention in NumPy float64, query by query, its gradients, and how far rounding may take an implementation.

Bounds are of first order, element by element, in units of u = 2^-24 (float32) and of a unit `stored` of what is rounded to
the operands' dtype: weights and gradients of scores before their products, and results. A sum of n terms has at most n
roundings, whatever its order.
"""

from typing import NamedTuple

import numpy as np

U = 2.0**-24


class Forward(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    weights: np.ndarray  # [b, h, t, s]


def seen(b, t, s, segments=None, offset=None) -> np.ndarray:
    """[b, t, s] by the definition, one query at a time."""
    mask = np.zeros((b, t, s), bool)
    for row in range(b):
        first = 0 if offset is None else np.broadcast_to(offset, b)[row]
        for query in range(t):
            mask[row, query, : max(0, first + query + 1)] = True
            if segments is not None:
                mask[row, query] &= segments[row] == segments[row, query]
    return mask


def forward(q, k, v, mask) -> Forward:
    scores = np.where(mask[:, None], q @ k.swapaxes(-1, -2), -np.inf)
    top = scores.max(-1, keepdims=True, initial=-1e9)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, np.inf, top + np.log(total))[..., 0]
    weights = p / np.where(total == 0, 1, total)
    return Forward(weights @ v, lse, weights)


def _score_error(q, k, lse) -> np.ndarray:
    """Relative error of a weight exp(score - lse) [b, h, t, 1]: that of the score, of the exponential's argument, and of
    the log-sum-exp as it is rounded."""
    products = np.abs(q) @ np.abs(k).swapaxes(-1, -2)
    largest = products.max(-1, keepdims=True)
    lse = np.where(np.isinf(lse), 0, np.abs(lse))[..., None]
    return U * ((q.shape[-1] + 2) * largest + largest + 4 * lse + 8)


def forward_bounds(q, k, v, f: Forward, stored) -> tuple[np.ndarray, np.ndarray]:
    """Of out and lse. Scores enter a weight twice: in the exponential and in the sum that divides it."""
    s = k.shape[2]
    score = _score_error(q, k, f.lse)
    magnitude = f.weights @ np.abs(v)
    out = magnitude * (2 * score + (2 * s + 8) * U + stored) + stored * np.abs(f.out)
    lse = score[..., 0] + (s + 8) * U + 4 * U * np.where(np.isinf(f.lse), 0, np.abs(f.lse))
    return out, lse


def backward(q, k, v, f: Forward, dout, stored) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Gradients of q, k, v and their bounds; an implementation is given `out` and `lse` rounded."""
    turned = lambda x: x.swapaxes(-1, -2)  # noqa: E731
    t, (s, values) = q.shape[2], v.shape[2:]
    p, dp = f.weights, dout @ turned(v)
    delta = (dout * f.out).sum(-1, keepdims=True)
    ds = p * (dp - delta)
    e_p = _score_error(q, k, f.lse)
    e_dp = (values + 1) * U * (np.abs(dout) @ turned(np.abs(v)))
    e_delta = ((values + 1) * U + stored) * (np.abs(dout) * np.abs(f.out)).sum(-1, keepdims=True)
    # Rounded twice at most: p on the way, if it is kept so, and ds.
    e_ds = p * ((e_p + 2 * U) * np.abs(dp - delta) + e_dp + e_delta) + 2 * stored * np.abs(ds)
    gradients = [ds @ k, turned(ds) @ q, turned(p) @ dout]
    bounds = [
        (e_ds + (s + 8) * U * np.abs(ds)) @ np.abs(k),
        turned(e_ds + (t + 8) * U * np.abs(ds)) @ np.abs(q),
        turned(p * (e_p + stored + (t + 8) * U)) @ np.abs(dout),
    ]
    return gradients, [e + stored * np.abs(g) for e, g in zip(bounds, gradients, strict=True)]


def assert_within(got, expected, bound) -> None:
    got = np.asarray(got).astype(np.float64)
    assert got.shape == expected.shape
    same = got == expected  # infinities
    error = np.where(same, 0, np.abs(got - np.where(same, 0, expected)))
    worst = np.unravel_index(np.argmax(np.where(np.isfinite(error), error - bound, np.inf)), error.shape)
    assert (error <= bound + 1e-30).all(), (
        f"at {worst}: {got[worst]} against {expected[worst]} +- {bound[worst]}"
    )

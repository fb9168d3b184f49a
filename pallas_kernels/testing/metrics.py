"""Error measures of quantised products."""

import numpy as np


def calc_diff(x, y) -> float:
    """1 - 2 sum(xy) / sum(x^2 + y^2) in float64: 0 for equal arrays, DeepGEMM's measure.

    A correct fine-grained FP8 product of Gaussian data lands at 6.5e-4 to 7.5e-4 against the unquantised one: much
    less means that nothing was quantised. NaN anywhere gives NaN.
    """
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    if x.shape != y.shape:
        raise ValueError(f"calc_diff: {x.size} against {y.size} elements")
    denominator = np.sum(x * x + y * y)
    if denominator == 0:
        return 0.0
    return float(1 - 2 * np.sum(x * y) / denominator)


def relative_l2(x, y) -> float:
    """||x - y|| / ||y|| in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))

"""Error measures of quantised products."""

import jax
import jax.numpy as jnp
import numpy as np


def calc_diff(x, y) -> float:
    """1 - 2 sum(xy) / sum(x^2 + y^2), DeepGEMM's measure, in float64: 0 for equal arrays, NaN if there is a NaN.

    Computed as sum((x - y)^2) / sum(x^2 + y^2), which is the same number without its cancellation. A correct
    fine-grained FP8 product of Gaussian data lands at 6.5e-4 to 7.5e-4 against the unquantised one: much less means
    that nothing was quantised.
    """
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    if x.shape != y.shape:
        raise ValueError(f"calc_diff: {x.size} against {y.size} elements")
    denominator = np.sum(x * x + y * y)
    return 0.0 if denominator == 0 else float(np.sum((x - y) ** 2) / denominator)


@jax.jit
def calc_diff_on_device(x, y) -> jax.Array:
    """Computes `calc_diff` in float32 where the arrays lie, for outputs too large to move; of several, of all together."""
    pairs = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in _pairs(x, y)]
    denominator = sum(jnp.sum(a * a + b * b) for a, b in pairs)
    return jnp.where(denominator == 0, 0, sum(jnp.sum((a - b) ** 2) for a, b in pairs) / denominator)


def _pairs(x, y) -> list[tuple[jax.Array, jax.Array]]:
    return list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def relative_l2(x, y) -> float:
    """Returns ||x - y|| / ||y|| in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))

"""Runs a module of tests with float64 in the place of float32:

    python -m tests.float64 MODULE ARGUMENTS

Two programs of one function that differ in the order of sums, or in what a compiler fuses, differ by rounding alone. In
float32 that hides differences below some 1e-6, and hides worse ones where rounding is not continuous: a value of 8 bits
that lies within rounding of the border between two of them may fall on either side, a sixteenth to an eighth apart, and
whatever follows from it. In float64 rounding is 2^29 times as small, and so are the chances of a value to lie that near
to a border. What is left is a difference between the functions.

Everything that the library computes in float32 is then float64: models, sums, scales, moments. Narrower formats stay
what they are: E4M3, E5M6, BF16, scales that are powers of two. Kernels for GPUs are left out.
"""

import runpy
import sys
from typing import Any

import jax
import jax.numpy as jnp


def _as_float64(cls: Any, field: str) -> None:
    """The dtype that a config names "float32" is float64."""
    checked = cls.__post_init__

    def widened(self: Any) -> None:
        wide = getattr(self, field) in ("float32", "float64")
        if wide:
            object.__setattr__(self, field, "float32")
        checked(self)
        if wide:
            object.__setattr__(self, field, "float64")

    cls.__post_init__ = widened


def _ceil_to_power_of_two(s: jax.Array) -> jax.Array:
    """That of the library reads the bits of a float32."""
    mantissa, exponent = jnp.frexp(s)  # s = mantissa * 2^exponent, mantissa in [0.5, 1)
    power = jnp.ldexp(jnp.ones_like(s), jnp.where(mantissa == 0.5, exponent - 1, exponent))
    return jnp.where(jnp.isfinite(s), power, s)


def switch() -> None:
    """To be called before anything of the library is imported."""
    assert not any(name.split(".")[0] in ("deepseek_jax", "pallas_kernels") for name in sys.modules)
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64  # type: ignore[misc]

    from pallas_kernels import dispatch
    from pallas_kernels.quantize import fallback

    dispatch.why_not_hopper = lambda: "float64"
    fallback.ceil_to_power_of_two = _ceil_to_power_of_two

    from deepseek_jax.config import ModelConfig, OptimizerConfig

    _as_float64(ModelConfig, "dtype")
    _as_float64(OptimizerConfig, "moment_dtype")


if __name__ == "__main__":
    switch()
    _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

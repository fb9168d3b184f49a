"""One test class that every implementation of an op passes: reference, XLA path, and the kernel in the interpreter."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.dispatch import IMPLEMENTATIONS
from tests.kernels.interpreter import HAS_INTERPRETER, interpret_mode, races_found

NO_INTERPRETER = f"jax {jax.__version__} cannot interpret FP8 kernels; 0.11 and later can"


def run(fn: Callable, implementation: str | None, *operands) -> Any:
    """fn(*operands, implementation), jitted; kernels run in the interpreter, which must find no data race."""
    if implementation != "mosaic":
        return jax.jit(lambda *xs: fn(*xs, implementation))(*operands)
    if not HAS_INTERPRETER:
        pytest.skip(NO_INTERPRETER)
    with interpret_mode():
        out = jax.block_until_ready(jax.jit(lambda *xs: fn(*xs, implementation))(*operands))
    assert not races_found()
    return out


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
      call: (*operands, implementation) -> output or tuple of outputs.
      operands: arrays.
      check: output -> None, raising AssertionError.
      only: implementations that support the call.
    """

    call: Callable
    operands: tuple
    check: Callable
    only: tuple[str, ...] = IMPLEMENTATIONS


@functools.cache
def build(case: Callable[[], Case]) -> Case:
    """Build a case once for all implementations: its operands and oracle are the same."""
    return case()


class OpSuite:
    """Subclass with `cases`: name -> function that builds the Case; `implementations`: fewer where a kernel would take too
    long in the interpreter."""

    cases: dict[str, Callable[[], Case]]
    implementations: tuple[str, ...] = IMPLEMENTATIONS

    def test_implementation(self, case: str, implementation: str):
        if implementation == "mosaic" and not HAS_INTERPRETER:
            pytest.skip(NO_INTERPRETER)
        built = build(self.cases[case])
        if implementation not in built.only:
            with pytest.raises(ValueError, match="does not support this call"):
                built.call(*built.operands, implementation)
            return
        built.check(run(built.call, implementation, *built.operands))


def pytest_generate(metafunc) -> None:
    """Parametrise `test_implementation` of an OpSuite with its cases."""
    if metafunc.function.__name__ == "test_implementation":
        metafunc.parametrize("implementation", metafunc.cls.implementations)
        metafunc.parametrize("case", list(metafunc.cls.cases))


def assert_product(actual, expected: np.ndarray, magnitude: np.ndarray, terms: int) -> None:
    """Compare a float32-accumulated product with its float64 value.

    Args:
      expected, magnitude: sum of products, and sum of their absolute values, in float64.
      terms: number of roundings on the way to one output, an upper bound; each is at most 2^-24 of `magnitude`.
    """
    actual = np.asarray(actual)
    stored = 2.0**-8 if actual.dtype != np.float32 else 0.0  # a bfloat16 result is rounded once more
    tolerance = terms * 2.0**-24 * magnitude + stored * np.abs(expected) + 1e-30
    error = np.abs(actual.astype(np.float64) - expected)
    assert error.shape == expected.shape
    worst = np.unravel_index(np.argmax(error - tolerance), error.shape)
    assert np.all(error <= tolerance), f"at {worst}: {actual[worst]} against {expected[worst]}"

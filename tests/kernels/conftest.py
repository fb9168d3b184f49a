"""Every kernel test starts from a clean interpreter, and stops by itself where an interpreted kernel deadlocks."""

import pytest

from tests.kernels.interpreter import HAS_INTERPRETER, reset_interpreter

DEADLOCK_S = 120


def pytest_collection_modifyitems(items):
    for item in items:
        if "kernels" in item.path.parts and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(DEADLOCK_S))


@pytest.fixture(autouse=True)
def clean_interpreter():
    if HAS_INTERPRETER:
        reset_interpreter()
    yield


@pytest.fixture
def optimised(monkeypatch):
    """Processes that a test starts compile as outside of tests: what they make is looked at."""
    monkeypatch.delenv("XLA_FLAGS")

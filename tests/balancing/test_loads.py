"""Counts that fade, and the file that keeps them."""

import json

import numpy as np
import pytest

from deepseek_jax.balancing import loads


def test_what_came_a_half_life_ago_counts_half():
    window = loads.Window(1, 2, half_life=100)
    window.add([[64, 0]])
    window.add([[0, 100]])
    np.testing.assert_allclose(window.count_le, [[32, 100]])
    window.add([[100, 100]])
    np.testing.assert_allclose(window.count_le, [[108, 125]])


def test_steps_without_tokens_forget_nothing():
    window = loads.Window(2, 3, half_life=10)
    window.add([[1, 2, 3], [3, 2, 1]])
    for _ in range(1000):
        window.add(np.zeros((2, 3), np.int32))
    np.testing.assert_array_equal(window.count_le, [[1, 2, 3], [3, 2, 1]])


@pytest.mark.parametrize(
    "counts, words",
    [
        ([[1, 2]], r"counts of shape \(1, 2\) for 2 MoE layers of 2 experts"),
        ([[1, 2], [3, -1]], "layer 1 counts -1.0 rows of expert 1"),
        ([[1, float("nan")], [3, 1]], "layer 0 counts nan rows of expert 1"),
    ],
)
def test_counts_that_are_none_are_refused_and_leave_the_window(counts, words):
    window = loads.Window(2, 2)
    window.add([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=words):
        window.add(counts)
    np.testing.assert_array_equal(window.count_le, [[1, 2], [3, 4]])


def test_a_file_keeps_counts(tmp_path):
    path, counts = tmp_path / "loads.json", np.random.default_rng(0).random((3, 8)) * 1000
    loads.write(path, counts)
    loads.write(path, counts)
    np.testing.assert_allclose(loads.read(path, 3, 8), counts, atol=5e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["loads.json"]


GOOD = {"format": loads.FORMAT, "version": 1, "layers": 2, "experts": 2, "counts": [[1, 2.5], [0, 4]]}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": "another"}, "format='another' should be 'deepseek_jax expert loads'"),
        ({"version": 2}, "version=2 should be 1"),
        ({"layers": 3}, "layers=3 should be 2"),
        ({"experts": None}, "experts=None should be 2"),
        ({"counts": None}, "counts should be a list of lists of numbers"),
        ({"counts": [[1, 2], 3]}, "counts should be a list of lists of numbers"),
        ({"counts": [[1, "2"], [3, 4]]}, "counts should be a list of lists of numbers"),
        ({"counts": [[1, True], [3, 4]]}, "counts should be a list of lists of numbers"),
        ({"counts": [[1, 2]]}, r"counts has 1 lists of \[2\] numbers for 2 layers of 2 experts"),
        ({"counts": [[1, 2], [3]]}, r"counts has 2 lists of \[1, 2\] numbers"),
        ({"counts": [[1, 2], [3, -4]]}, "layer 1 counts -4.0 rows of expert 1"),
        ({"counts": [[1, 10**400], [3, 4]]}, "counts should be a list of lists of numbers"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, change, words):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(GOOD))
    np.testing.assert_array_equal(loads.read(path, 2, 2), GOOD["counts"])
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=words) as error:
        loads.read(path, 2, 2)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        loads.read(tmp_path / "loads.json", 2, 2)
    (tmp_path / "loads.json").write_text('{"counts": [[NaN]]}')
    with pytest.raises(ValueError, match="not a finite number"):
        loads.read(tmp_path / "loads.json", 2, 2)

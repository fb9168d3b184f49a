"""pass@k by its vector, by counting all choices, and without bias."""

import itertools
import math

import pytest

from deepseek_jax.evaluation.passk import mean_pass_at_k, pass_at_k


def test_the_vector():
    found = [pass_at_k(10, 3, k) for k in (1, 2, 5, 8)]
    assert found == pytest.approx([0.3, 0.5333333333333333, 11 / 12, 1], rel=1e-15)


def test_it_is_the_share_of_choices_that_have_a_right_one():
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1) if c <= n else ():
            right = [i < c for i in range(n)]
            chosen = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-15)


def test_it_has_no_bias():
    """Over all outcomes of six draws, each right with 0.3, its mean is 1 - 0.7^k."""
    for k in range(1, 7):
        mean = sum(math.comb(6, c) * 0.3**c * 0.7 ** (6 - c) * pass_at_k(6, c, k) for c in range(7))
        assert mean == pytest.approx(1 - 0.7**k, rel=1e-12)


def test_mean_over_questions_with_its_error():
    mean, error = mean_pass_at_k([(4, 0), (4, 4), (4, 2), (4, 2)], 1)
    assert (mean, error) == (0.5, pytest.approx(math.sqrt(0.5 / 3 / 4)))
    assert math.isnan(mean_pass_at_k([(4, 1)], 1)[1])
    with pytest.raises(ValueError, match="no question"):
        mean_pass_at_k([], 1)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_what_cannot_be(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {c} right among {n} answers"):
        pass_at_k(n, c, k)

"""A share of the random cases; `python -m tests.balancing.properties` goes through 10,000."""

from tests.balancing import properties


def test_random_cases():
    properties.main(cases=100, seed=1)

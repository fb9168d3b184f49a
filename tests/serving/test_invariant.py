"""Invariant mode with drafts, once; `invariant.py` is the long form."""

from tests.serving.invariant import check


def test_tokens_and_log_probabilities_are_bit_for_bit_those_alone():
    stats = check(0, drafts=True, n=3).stats
    assert stats.cache_hits and stats.accepted and stats.generated > 100

"""How long programs take: what came before a chunk counts."""

import pytest

from deepseek_jax.serving.pace import Pace


def test_a_chunk_takes_longer_behind_a_prefix():
    pace = Pace({("prefill", 1, 64): 0.01, ("prefix", 1, 64): 1e-5})
    assert pace.chunks(1, 64, 0) == 0.01
    assert pace.chunks(1, 64, 2000) == pytest.approx(0.03)
    assert pace.chunks(1, 16, 2000) == 0.0  # nobody has timed it

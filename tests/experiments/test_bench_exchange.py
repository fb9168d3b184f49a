"""The peers of `bench exchange` compute what they are said to: all pairs, or all that fit."""

import jax
import numpy as np
import pytest

from experiments import bench_exchange as bench
from tests.parallel.comparison import BOUND, difference
from tests.parallel.harness import dense, on_mesh


@pytest.fixture
def small(monkeypatch):
    for name, value in {"N": 12, "D": 10, "F": 6, "E": 16, "K": 3}.items():
        monkeypatch.setattr(bench, name, value)


def kept(ids):
    """The pairs of each device that fit: of each expert the first, in the order of the tokens. Others -1."""
    out = np.full_like(ids, -1)
    for device in range(bench.DEVICES):
        used = np.zeros(bench.E, int)
        for n in range(device * bench.N, (device + 1) * bench.N):
            for k, e in enumerate(ids[n]):
                used[e] += 1
                if used[e] <= bench._capacity_rows():
                    out[n, k] = e
    return out


@pytest.mark.parametrize("way", ["padded", "gathered"])
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_peers(small, way, skew):
    p, x, w = bench._arrays()
    ids = bench.routing(skew)
    fits = kept(ids) if way == "padded" else ids
    got = on_mesh(getattr(bench, f"{way}_experts"), (bench.NODES, bench.LOCAL), 4)(p, x, ids, w)
    assert difference(got, jax.jit(dense)(p, x, fits, w)) < BOUND
    assert bench._dropped(ids) == (kept(ids) < 0).sum() > 0

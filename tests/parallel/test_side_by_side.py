"""A segment without work is its trip, without a trip its work; with both, see `test_overlap.py`."""

import jax
import numpy as np

from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.transport import DISPATCH
from deepseek_jax.parallel.side_by_side import Trip, segment
from tests.parallel.harness import E, arrays, on_mesh, routings
from tests.programs import equations

SHAPE, N = (4, 2), 24


def both(x_nd, weights_nk, ids_nk, before_d):
    plan = Ragged(receive=1).plan(ids_nk, E // 8)
    came, none = segment(Trip(DISPATCH, (x_nd, weights_nk), plan, after=before_d))
    no_trip, worked = segment(None, lambda x: (x, 2 * x), lambda between: between[0] + between[1], x_nd)
    assert none == no_trip == ()
    return came, DISPATCH((x_nd, weights_nk), plan), worked


def test_a_trip_alone_and_work_alone():
    _, x, weights, _ = arrays(N)
    args = (x, weights, routings(N)["random"].astype(np.int32), np.full(8, np.nan, np.float32))
    program = on_mesh(both, SHAPE, 4)
    came, want, worked = program(*args)
    jax.tree.map(np.testing.assert_array_equal, came, want)
    np.testing.assert_array_equal(worked, 3 * x)
    # With further rounds, what is to be there before is read; `test_rounds.py` says that the compiled program waits.
    (on_devices,) = (e for e in program.trace(*args).jaxpr.eqns if e.primitive.name == "shard_map")
    inner = on_devices.params["jaxpr"]
    assert any(v is inner.invars[-1] for e in equations(inner) for v in e.invars)

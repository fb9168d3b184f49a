"""Two halves of the rows of a pass over pages: states and pages are those of all rows at once.

The long form, of all kinds, is `halved_passes.py`.
"""

import jax.numpy as jnp
import pytest

from deepseek_jax.model.cache import paged_view
from deepseek_jax.model.decoding import ONE_DEVICE
from deepseek_jax.parallel.layout import halved
from deepseek_jax.parallel.two_batches import InTheMiddle, cut, divides
from tests.parallel.comparison import BOUND
from tests.parallel.halved_passes import Case, alone, differ, over_devices


@pytest.mark.parametrize("case", [Case("one", "few", 3, 2), Case("one", "many", 1, 16, 1)])
def test_halves_are_the_whole(case):
    """Decode rows with drafts, an odd number of them, in two layers; and a chunk of one sequence, cut in two, in a last layer."""
    assert max(differ(case, over_devices(case, in_halves=True), alone(case))) < BOUND


def test_a_row_is_cut_in_the_middle_of_its_tokens():
    table = jnp.zeros((1, 1), jnp.int32)
    view = paged_view(jnp.zeros((1, 1, 8, 1)), table, jnp.array([20]), 8, jnp.array([5]))
    how = cut(view)
    assert isinstance(how, InTheMiddle)
    a, b = (how.view(view, half) for half in (0, 1))
    assert (a.positions_bt.tolist(), a.lengths.tolist()) == ([[-1, 15, 16, 17]], [18])
    assert (b.positions_bt.tolist(), b.lengths.tolist()) == ([[-1, -1, 18, 19]], [20])
    x_bt = jnp.arange(8)[None]
    back = how.joined(*(how.of(x_bt, half) for half in (0, 1)))
    assert back[0, 3:].tolist() == [3, 4, 5, 6, 7]


def test_what_has_halves():
    assert divides(2, 1, 1) and divides(1, 16, 4) and not divides(1, 12, 4) and not divides(1, 1, 1)
    assert halved(ONE_DEVICE) is ONE_DEVICE  # no tokens travel

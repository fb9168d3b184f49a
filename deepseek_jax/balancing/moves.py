"""What must be copied for a new plan to hold, and from where.

A layer changes at once: all its slots are filled from what they held before, and the table that tells tokens where to go changes
with them. So every layer is served by one plan or the other, no copy is lost in whichever order layers follow each other, and
they may do so at leisure.

Dims: l layer, p slot, x slot that changes, c copy of its expert.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.balancing.plan import Ints, Plan


class Moves(NamedTuple):
    """How many slots of how many layers take their weights from where; `stay`: have them already."""

    stay: int
    same_gpu: int
    same_node: int
    across: int

    @property
    def moved(self) -> int:
        return self.same_gpu + self.same_node + self.across


def sources(new: Plan, old: Plan, gpus: int, nodes: int) -> Ints:
    """The old slot from which each new one takes its weights, int32 [l, p]: itself where it may, else one of the same GPU, else of
    the same node. What several copies can give, they give in turn."""
    source_lp = np.tile(np.arange(new.physical_lp.shape[1], dtype=np.int32), (len(new.physical_lp), 1))
    layer, to = np.nonzero(new.physical_lp != old.physical_lp)
    have_xc = old.log2phy[layer, new.physical_lp[layer, to]]
    alike = [
        have_xc * n // source_lp.shape[1] == (to * n // source_lp.shape[1])[:, None] for n in (gpus, nodes)
    ]
    near_xc = (have_xc >= 0) * (1 + alike[0] + alike[1])
    nearest_xc = near_xc == near_xc.max(1, keepdims=True)
    turn = to % nearest_xc.sum(1)
    chosen = (np.cumsum(nearest_xc, 1) > turn[:, None]).argmax(1)
    source_lp[layer, to] = have_xc[np.arange(len(to)), chosen]
    return source_lp


def count(source_lp: Ints, gpus: int, nodes: int) -> Moves:
    """How many slots stay, or come from where."""
    slots = source_lp.shape[1]
    to = np.arange(slots)
    of_gpu, of_node = (source_lp * n // slots == to * n // slots for n in (gpus, nodes))
    within = [int(same.sum()) for same in (source_lp == to, of_gpu, of_node, np.ones_like(of_gpu))]
    return Moves(*np.diff([0, *within]).tolist())

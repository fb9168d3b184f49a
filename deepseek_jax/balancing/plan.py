"""A plan says which expert lies in which slot of which layer.

A slot has room for the weights of one expert; the slots of a GPU are consecutive, and so are the GPUs of a node. With more slots
than experts some experts lie in several, and share their tokens evenly.

Dims: l layer, p slot (physical expert), e logical expert, c copy of an expert, g GPU.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepseek_jax.checks import require

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


class Unit(NamedTuple):
    """What experts are placed over: `slots` in all, over `gpus` of `nodes`, and the router's `groups` of experts."""

    slots: int
    groups: int
    nodes: int
    gpus: int

    @property
    def hierarchical(self) -> bool:
        """Whether a group of experts stays on one node (report section 3.4.1), so that tokens meet few nodes."""
        return self.groups % self.nodes == 0


class Plan(NamedTuple):
    """physical_lp int32: the logical expert of each slot; every expert has at least one in each layer."""

    physical_lp: Ints

    @property
    def experts(self) -> int:
        return int(self.physical_lp.max()) + 1

    @property
    def redundant(self) -> int:
        """Slots more than there are experts."""
        return self.physical_lp.shape[1] - self.experts

    @property
    def logcnt(self) -> Ints:
        """How many copies each expert has: int32 [l, e]."""
        layers = len(self.physical_lp)
        at_lp = self.physical_lp + np.arange(layers)[:, None] * self.experts
        counts = np.bincount(at_lp.ravel(), minlength=layers * self.experts)
        return counts.reshape(layers, self.experts).astype(np.int32)

    @property
    def log2phy(self) -> Ints:
        """The slots of each expert, lowest first, -1 after the last: int32 [l, e, most copies]."""
        return self.copies()

    def copies(self, most: int | None = None) -> Ints:
        """`log2phy` with room for `most` copies of each expert, by default for as many as there are. `slots - experts + 1` are
        enough for every plan: programs that take arrays of this shape take all plans.

        Raises ValueError for an expert with more.
        """
        count_le = self.logcnt
        (layers, slots), width = self.physical_lp.shape, int(count_le.max())
        most = width if most is None else most
        require(most >= width, f"an expert has {width} copies, more than {most}; make room for as many")
        order_lp = np.argsort(self.physical_lp, axis=1, kind="stable")  # slots, expert by expert
        expert_lp = np.take_along_axis(self.physical_lp, order_lp, 1)
        copy_lp = np.arange(slots) - np.take_along_axis(np.cumsum(count_le, 1) - count_le, expert_lp, 1)
        slot_lec = np.full((layers, self.experts, most), -1, np.int32)
        slot_lec[np.arange(layers)[:, None], expert_lp, copy_lp] = order_lp
        return slot_lec

    def checked(self, experts: int, slots: int) -> "Plan":
        """Raises ValueError unless it gives every one of `experts` a slot in each layer, and has `slots` of them."""
        shape = self.physical_lp.shape
        right = len(shape) == 2 and shape[0] > 0 and shape[1] == slots
        require(right, f"a plan of shape {shape} should be [layers, {slots} slots]")
        low, high = self.physical_lp.min(), self.physical_lp.max()
        require(low >= 0 and high < experts, f"the plan names experts {low} to {high} of {experts}")
        for layer, expert_p in enumerate(self.physical_lp):
            lost = np.setdiff1d(np.arange(experts), expert_p)
            require(not lost.size, f"layer {layer} has no slot for expert {lost[:1].sum()}; give it one")
        return self


def identity(layers: int, experts: int) -> Plan:
    """Expert e in slot e: no copies."""
    return Plan(np.tile(np.arange(experts, dtype=np.int32), (layers, 1)))


def loads_of_gpus(plan: Plan, count_le: npt.ArrayLike, gpus: int) -> Floats:
    """Rows that each GPU gets, if an expert's copies share its rows evenly: float64 [l, g]."""
    share_le = np.asarray(count_le, np.float64) / plan.logcnt
    layers, slots = plan.physical_lp.shape
    return np.take_along_axis(share_le, plan.physical_lp, 1).reshape(layers, gpus, slots // gpus).sum(2)


def balance(load_lg: Floats) -> float:
    """Mean over fullest GPU, 1 at best: a layer takes as long as its fullest GPU, so both are summed over the layers."""
    fullest = load_lg.max(1).sum()
    return float(load_lg.mean(1).sum() / fullest) if fullest else 1.0

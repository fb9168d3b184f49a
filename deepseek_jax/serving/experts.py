"""Experts that move while the engine runs (report section 3.4): loads go to the planner, its plans come back, layer by layer.

Every so many steps the loads that the devices counted go to the host, which reads them when they are there, and offers them to the
planner (`balancing/planner.py`), which makes plans on a thread of its own. A plan is moved to between the turns of the engine, in
each the experts of one layer, whether there are requests or not: no turn takes longer than without by more than that. A layer's
tokens go by its old plan until it is moved, and by the new one from then on; the model's function is the same under both, but for
the order of a token's sum over its experts.

While there are steps, the host waits for nothing here. On the devices, counting adds one small kernel to each MoE layer of a step,
whose input is the ids of its tokens' experts; a reading is a sum over all devices of a number for each layer and expert, 60 kB in
DeepSeek-V3.
"""

import os
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.balancing import loads
from deepseek_jax.balancing.eplb import planned
from deepseek_jax.balancing.loads import Window
from deepseek_jax.balancing.plan import Plan
from deepseek_jax.balancing.planner import Planner, PlanningError, When
from deepseek_jax.checks import require, shown
from deepseek_jax.serving.options import Options

READ = 32  # steps from one reading of the loads to the next, at most


class Experts:
    """What an engine does about its experts.

    Args:
        device: `OverMesh`, with experts in slots.
        options: how often they are planned anew, and a file of loads to begin with. Raises ValueError for one that is wrong, or
            cannot be written.

    Attributes:
        planner: has the loads and the age of the plan (`report`).
        moves: layers that were moved.
    """

    def __init__(self, device: Any, options: Options):
        self._device, self._file = device, _writable(options.expert_loads)
        self._every = min(READ, options.replan)
        unit, plan = device.slots.unit, device.slots.plan
        layers, experts = len(plan.physical_lp), device.cfg.n_routed_experts
        window = Window(layers, plan.experts)
        if self._file is not None and self._file.exists():
            window.count_le[:] = self._of_all(loads.read(self._file, layers, experts))
            plan = planned(window.count_le, unit)
        when = When(every=options.replan, below=options.replan_below)
        self.planner = Planner(Plan(plan.physical_lp.copy()), unit, when, window)
        self.moves = 0
        self._steps = 0  # since the last reading
        self._reading: tuple[jax.Array, int] | None = None  # loads on their way, and of how many steps
        self._left: deque[int] = deque()  # layers that are still to be moved
        self._aim(plan)
        while self._left:  # before there is a request
            self._move()

    @property
    def left(self) -> int:
        """Layers that are still to be moved."""
        return len(self._left)

    def turn(self, launched: bool = True) -> None:
        """What there is to do in a turn of the engine, after its step, if any, was launched."""
        self._steps += launched
        self._read()
        if self._left:
            self._move()
            if not launched:  # a request that comes now waits for this layer, and for no other
                self._device.wait()
            return
        try:
            plan = self.planner.take()
        except PlanningError:  # the report says so
            return
        if plan is not None:
            self._aim(plan)

    def close(self) -> None:
        """Keeps the loads for the next start."""
        if self._file is not None:
            routed = self._device.cfg.n_routed_experts
            loads.write(self._file, self.planner.window.count_le[:, :routed])

    def _read(self) -> None:
        if self._reading is not None and self._reading[0].is_ready():  # type: ignore[attr-defined]
            (counts_le, steps), self._reading = self._reading, None
            self._offer(np.asarray(counts_le), steps)
        if self._reading is None and self._steps >= self._every:
            self._reading, self._steps = (self._device.loads(), self._steps), 0

    def _offer(self, counts_le: np.ndarray, steps: int) -> None:
        try:
            self.planner.offer(self._of_all(counts_le), steps)
        except PlanningError:
            return

    def _of_all(self, count_le: Any) -> Any:
        """Counts of the routed experts, and of the shared one where that is one more of them."""
        shared = self._device.slots.shared_routed
        return loads.with_shared(count_le, self._device.cfg.num_experts_per_tok) if shared else count_le

    def _aim(self, plan: Plan) -> None:
        self._plan = plan
        differs_l = (plan.physical_lp != self._device.slots.plan.physical_lp).any(1)
        self._left.extend(np.flatnonzero(differs_l).tolist())

    def _move(self) -> None:
        layer = self._left.popleft()
        self._device.move(layer, self._plan.physical_lp[layer])
        self.moves += 1


def _writable(name: str | None) -> Path | None:
    """A file that is to be written at the end. Raises ValueError for one that cannot be, before anybody has counted for it."""
    if name is None:
        return None
    path = Path(name)
    where = path.parent
    require(
        where.is_dir() and os.access(where, os.W_OK) and not path.is_dir(),
        f"expert_loads={shown(name)}: no file can be written there; name one in a folder that is there",
    )
    return path

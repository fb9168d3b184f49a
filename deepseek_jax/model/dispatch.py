"""How tokens reach their routed experts: what a MoE layer asks of whatever brings them there.

    plan = d.plan(experts_nk, n_local, placement)       layout of a routing; serves forward, recomputation and backward
    came = d.dispatch(x_nd, weights_nk, plan)           tokens -> rows of this device's experts
    y    = d.experts(p, came, x_nd, weights_nk, plan)   the experts on these rows
    y_nd = d.combine(y, plan)                           plain sums over experts, at the tokens' sources

`Local` is the dispatcher of one device; those of a mesh are in `parallel/exchange/`. Each step is differentiable, but
for that of decoding. Over a mesh, the transpose of a dispatch is the combine of the gradients and the other way round.

Dims: n token of this device, r row received, d hidden, k selected expert, e expert of this device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.layers import Params

# Name of what every recompute policy keeps: where each token's row goes, small and made by communication.
EXPERT_PLAN = "expert_plan"


class Received(NamedTuple):
    """Rows for this device's experts. What is differentiated is `x_rd` and `weights_rk`."""

    x_rd: jax.Array  # in the compute dtype; zeros where nobody sent a row
    weights_rk: Any = None  # float32: routing weights
    experts_rk: Any = None  # int32: experts of this device; ids outside of [0, e) are absent
    sent: tuple[jax.Array, jax.Array] | None = (
        None  # the rows as they travelled, if in FP8: (E4M3 [r, d], scales)
    )


class Dispatcher(Protocol):
    """Plans, results `y` and what a dispatch gives are pytrees that only the dispatcher reads."""

    def plan(self, experts_nk: jax.Array, n_local: int, placement: Any = None) -> Any:
        """experts_nk int32 [n, k]: ids outside of the experts are absent. n_local: experts on each device. placement: of the
        gate's experts among those that devices hold (`parallel/exchange/placement.py`); None: they are the same."""

    def dispatch(self, x_nd: jax.Array, weights_nk: jax.Array, plan: Any) -> Any: ...

    def experts(self, p: Params, came: Any, x_nd: jax.Array, weights_nk: jax.Array, plan: Any) -> Any: ...

    def combine(self, y: Any, plan: Any) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Local:
    """All experts are here. `function`: (p, x [n, d], ids [n, k], weights [n, k]) -> [n, d]."""

    function: Callable[..., jax.Array] = routed_experts

    def plan(self, experts_nk: jax.Array, n_local: int, placement: Any = None) -> jax.Array:
        return experts_nk if placement is None else placement.physical(experts_nk)

    def dispatch(self, x_nd: jax.Array, weights_nk: jax.Array, plan: jax.Array) -> Received:
        return Received(x_nd, weights_nk, plan)

    def experts(
        self, p: Params, came: Received, x_nd: jax.Array, weights_nk: jax.Array, plan: jax.Array
    ) -> jax.Array:
        return self.function(p, x_nd, plan, weights_nk)

    def combine(self, y: jax.Array, plan: jax.Array) -> jax.Array:
        return y

"""Dispatchers over a mesh (`model/dispatch.py: Dispatcher`): how they plan, and the one for many tokens.

To be used inside `shard_map` (check_vma=False), with expert parameters sharded over (node, local, tensor) in order: the
device j of node i, where j counts the devices of a node along local, then tensor, holds the experts of rank
i * (devices of a node) + j. Every device brings its own tokens and gets their sums back. Nothing the shared expert
needs goes through the exchange.

The expert applies the routing weight, before its down-projection (`model/experts.py`): a dispatch carries weights and
expert ids beside the tokens, a combine is a plain sum.

Dims: n token of this device, d hidden, k selected expert, r row received, e expert of this device.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.checks import choice
from deepseek_jax.config import EXCHANGES
from deepseek_jax.model.dispatch import EXPERT_PLAN, Received
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.layers import Params
from deepseek_jax.parallel.exchange.hops import Plan, make_plan
from deepseek_jax.parallel.exchange.placement import Placement
from deepseek_jax.parallel.exchange.ragged import IMPLEMENTATIONS, Axis
from deepseek_jax.parallel.exchange.rounds import in_rounds, on_rows
from deepseek_jax.parallel.exchange.transport import COMBINE, DISPATCH, Direction, combine, dispatch
from deepseek_jax.parallel.exchange.wire import Wire
from deepseek_jax.precision.product import product

INSIDE = ("local", "tensor")  # of a node
FLAT: tuple[Axis, ...] = (("node", *INSIDE),)
TWO_HOP: tuple[Axis, ...] = ("node", INSIDE)
MODES = dict(zip(EXCHANGES, (FLAT, TWO_HOP), strict=True))
AS_IT_IS = Wire()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverMesh(abc.ABC):
    """What dispatchers over a mesh have in common.

    wire: formats of dispatch and combine; by default arrays as they are.
    implementation: of the collective; None picks by platform when the program is lowered. "native"
      (`lax.ragged_all_to_all`) is to be named for topologies without devices, "dense" is the exact emulation.
    """

    wire: Wire = AS_IT_IS
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation={self.implementation!r} is not one of {list(IMPLEMENTATIONS)}")

    def plan(self, experts_nk: jax.Array, n_local: int, placement: Placement | None = None) -> Any:
        """The layout of a routing by the gate; under recomputation it is made once."""
        with jax.named_scope("plan"):
            if placement is not None:
                experts_nk = placement.physical(experts_nk, lax.axis_index(FLAT[0]))
            plan = self._layout(experts_nk, n_local)
        return jax.tree.map(lambda a: checkpoint_name(a, EXPERT_PLAN), plan)

    @abc.abstractmethod
    def _layout(self, experts_nk: jax.Array, n_local: int) -> Any:
        """The plan for physical ids."""

    @property
    @abc.abstractmethod
    def ways(self) -> tuple[Direction, Direction]:
        """Dispatch and combine in stages (`transport.py`), without a gradient. A dispatch takes (tokens, weights), a combine
        what the experts give."""

    def __call__(
        self: Any,
        p: Params,
        x_nd: jax.Array,
        experts_nk: jax.Array,
        weights_nk: jax.Array,
        placement: Placement | None = None,
    ) -> jax.Array:
        """The four calls: sum_k weights_nk * FFN_{experts_nk}(x_n) -> [n, d]."""
        plan = self.plan(experts_nk, product(p["w_down_efd"]).experts, placement)
        came = self.dispatch(x_nd, weights_nk, plan)
        return self.combine(self.experts(p, came, x_nd, weights_nk, plan), plan)


class Results(NamedTuple):
    """What the experts give: `y_rd` of the first round, whose combine is to come, and what further rounds add to the
    tokens [n, d], or None where one round holds whatever there is."""

    y_rd: jax.Array
    more_nd: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged(OverMesh):
    """The dispatcher for many tokens: prefill and training.

    mode: "two_hop" (between nodes, then inside) or "flat" (both at once).
    function: one device's experts, `experts.routed_experts`; ids of absent experts are -1.
    most: on how many peers of the first hop a token's experts lie at most: `placement.nodes_per_token` for "two_hop"
      (None: any number). A token with more gets NaN.
    receive: None makes buffers for the worst routing; a number bounds what the last hop sends and receives, and the
      experts' work, to `receive` x n (token, expert) pairs at a time, see `MeshConfig.receive`. Nothing is dropped:
      the rest comes in further rounds. What a first hop receives, at most nodes x n rows, is not bounded.
    apart: the weight gradients of further rounds do not hold up the others (`rounds.py`), for a pipeline.
    """

    mode: str = "two_hop"
    function: Callable[..., jax.Array] = routed_experts
    most: int | None = None
    receive: float | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("mode", self.mode, EXCHANGES)
        if self.receive is not None and self.receive <= 0:
            raise ValueError(f"receive={self.receive} must be positive, or None for buffers without bound")

    def _layout(self, experts_nk: jax.Array, n_local: int) -> Plan:
        return make_plan(
            MODES[self.mode], experts_nk, n_local, self.wire, self.most, self.receive, self.implementation
        )

    def dispatch(self, x_nd: jax.Array, weights_nk: jax.Array, plan: Plan) -> Received:
        return dispatch(x_nd, weights_nk, plan)

    def experts(
        self, p: Params, came: Received, x_nd: jax.Array, weights_nk: jax.Array, plan: Plan
    ) -> Results:
        if plan.rounds is None:
            return Results(on_rows(self.function, p, came, plan), None)
        return Results(*in_rounds(self.function, self.apart, p, came, x_nd, weights_nk, plan))

    def combine(self, y: Results, plan: Plan) -> jax.Array:
        return _with_more(combine(y.y_rd, plan), y.more_nd, plan)

    @property
    def ways(self) -> tuple[Direction, Direction]:
        return DISPATCH, RESULTS


def _with_more(y_nd: jax.Array, more_nd: jax.Array | None, plan: Plan) -> jax.Array:
    y_nd = fitting(y_nd, plan)
    return y_nd if more_nd is None else y_nd + more_nd


# A combine of `Results`.
RESULTS = Direction(
    COMBINE.name,
    lambda y, plan: (COMBINE.load((y.y_rd,), plan), y.more_nd),
    lambda there, plan: (COMBINE.start(there[0], plan), there[1]),
    lambda there, plan: _with_more(COMBINE.finish(there[0], plan)[0], there[1], plan),
)


def fitting(y_nd: jax.Array, plan: Plan) -> jax.Array:
    """NaN for tokens of more peers than the plan was told of. A sum, which saves no mask of the size of y."""
    assert plan.fits_n is not None
    return y_nd + jnp.where(plan.fits_n, 0, jnp.nan).astype(y_nd.dtype)[:, None]

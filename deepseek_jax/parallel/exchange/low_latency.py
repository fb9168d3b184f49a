"""The exchange for few tokens, of decoding: buffers of fixed sizes, and no count that a host would have to read.

Between nodes, a token's row has a place for each node, taken or not: a plain all-to-all, of as many rows to each node as a
device has tokens. A token goes to about half of the nodes that it has places for (DeepSeek-V3: 3.5 of 8), and nobody has
to say first how many rows will come. Its expert ids and routing weights travel in the row; a row of zeros is none.
Inside a node a row goes to each device that has experts of it, by a ragged all-to-all, for which XLA has one kernel there
that writes into the peers' memory: fixed sizes would be those of all tokens of all nodes to each device, ten times the rows
that there are. On the way back, sums are made inside the node first. With `peers`, a kernel of ours takes both ways instead:
nothing is counted, packed or zeroed (`peers.py`). No GPU has run it yet.

What a device can receive is every token of every device, once, and its buffers are of that size. Experts are those of
`model/experts.py: arrived_experts`: in FP8 where weights are, on the bytes that travelled. Their products cost what the rows
that came do; gathering rows and SwiGLU go over the whole buffers, whatever came.

Runs inside `shard_map` (check_vma=False). No gradient. Dims: n token of this device, p node, m = p * n row at a node, r row
received, d hidden, k selected expert, w word.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.dispatch import Received
from deepseek_jax.model.experts import arrived_experts
from deepseek_jax.model.layers import Params
from deepseek_jax.parallel.exchange.dispatcher import FLAT, INSIDE, OverMesh
from deepseek_jax.parallel.exchange.hops import Hop, pairs_at, plan_hop, static, sums
from deepseek_jax.parallel.exchange.peers import PeerHop, plan_peers
from deepseek_jax.parallel.exchange.transport import Direction
from deepseek_jax.parallel.exchange.wire import Message, read, write

NODES = "node"


@flax.struct.dataclass
class FewPlan:
    """experts_nk int32: physical ids; to_pn bool: which tokens have experts at which node."""

    experts_nk: jax.Array
    to_pn: jax.Array
    n_local: int = static()


class Arrived(NamedTuple):
    """Rows for this device's experts; and how they came inside the node, None where it has one device."""

    rows: Received
    hop: Hop | PeerHop | None


class Results(NamedTuple):
    """y_rd: sums over this device's experts of the rows that came by `hop`."""

    y_rd: jax.Array
    hop: Hop | PeerHop | None


def _between_nodes(message: Message) -> Message:
    """As many rows for each node -> what each node's device of the same index has for this one."""
    if (nodes := lax.axis_size(NODES)) == 1:
        return message
    words_pnw = message.words_nw.reshape(nodes, -1, message.words_nw.shape[-1])
    words_pnw = lax.all_to_all(words_pnw, NODES, 0, 0, tiled=True)
    return message.with_words(words_pnw.reshape(message.words_nw.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowLatency(OverMesh):
    """The dispatcher for few tokens.

    function: one device's experts, as `experts.arrived_experts`.
    peers: rows go by `peers.py` inside a node; a mesh of several nodes, and a CPU, run its reference.
    """

    function: Callable[..., jax.Array] = arrived_experts
    peers: bool = False

    def _layout(self, experts_nk: jax.Array, n_local: int) -> FewPlan:
        at_a_node = n_local * lax.axis_size(INSIDE)
        to_np = pairs_at(experts_nk, 0, at_a_node, lax.axis_size(NODES)) > 0
        return FewPlan(experts_nk, to_np.T, n_local)

    def _inside(self, ids_mk: jax.Array, n_local: int) -> Hop | PeerHop | None:
        """The hop of a node's rows to its devices."""
        devices = lax.axis_size(INSIDE)
        if devices == 1:
            return None
        first = lax.axis_index(NODES) * devices * n_local
        to_mp = pairs_at(ids_mk, first, n_local, devices) > 0
        if self.peers:
            return plan_peers(to_mp, INSIDE)
        return plan_hop(to_mp, INSIDE, min(ids_mk.shape[1], devices), len(ids_mk), self.implementation)

    def dispatch(self, x_nd: jax.Array, weights_nk: jax.Array, plan: FewPlan) -> Arrived:
        return self.ways[0]((x_nd, weights_nk), plan)  # type: ignore[no-any-return]

    def experts(
        self, p: Params, came: Arrived, x_nd: jax.Array, weights_nk: jax.Array, plan: FewPlan
    ) -> Results:
        x_rd, weights_rk, ids_rk, sent = came.rows
        y_rd = self.function(p, x_rd, ids_rk, weights_rk, sent=sent, form=self.wire.dispatch)
        return Results(y_rd, came.hop)

    def combine(self, y: Results, plan: FewPlan) -> jax.Array:
        """Sums of each token's rows inside its nodes, then over these [n, d], added up in float32 each time."""
        return self.ways[1](y, plan)  # type: ignore[no-any-return]

    @property
    def ways(self) -> tuple[Direction, Direction]:
        """Over several nodes, the way between them is the first stage of a dispatch and the last of a combine; inside of one,
        a stage has all."""
        if lax.axis_size(NODES) > 1:
            return (
                Direction("dispatch", self._load, self._to_nodes, self._to_devices),
                Direction("combine", self._load_results, self._from_devices, self._from_nodes),
            )
        return (
            Direction("dispatch", self._load, self._to_all, lambda came, plan: came),
            Direction("combine", self._load_results, lambda there, plan: there, self._from_all),
        )

    def _load(self, values: tuple[jax.Array, jax.Array], plan: FewPlan) -> Message:
        """For each node, its tokens."""
        message = write((*values, plan.experts_nk + 1), self.wire.dispatch)
        words_pnw = jnp.where(plan.to_pn[..., None], message.words_nw[None], 0)
        return message.with_words(words_pnw.reshape(-1, words_pnw.shape[-1]))

    def _to_nodes(self, message: Message, plan: FewPlan) -> tuple[Message, Hop | PeerHop | None]:
        """The rows at this node that this device got, and where they go on to."""
        message = _between_nodes(message)
        return message, self._inside(read(message)[0][2] - 1, plan.n_local)

    def _to_devices(self, there: tuple[Message, Hop | PeerHop | None], plan: FewPlan) -> Arrived:
        message, hop = there
        if hop is not None:
            message, hop = hop.there(message)
        (x_rd, weights_rk, ids_rk), sent = read(message)
        ids_rk = ids_rk - 1 - lax.axis_index(FLAT[0]) * plan.n_local
        here = (ids_rk >= 0) & (ids_rk < plan.n_local)
        if hop is not None:
            here &= hop.live_r[:, None]
        return Arrived(Received(x_rd, weights_rk, jnp.where(here, ids_rk, -1), sent), hop)

    def _to_all(self, message: Message, plan: FewPlan) -> Arrived:
        return self._to_devices(self._to_nodes(message, plan), plan)

    def _load_results(self, y: Results, plan: FewPlan) -> tuple[Message, Hop | PeerHop | None]:
        return write((y.y_rd,), self.wire.combine), y.hop

    def _from_devices(self, there: tuple[Message, Hop | PeerHop | None], plan: FewPlan) -> Message:
        """The sums of a node's devices, at the device that got the rows."""
        message, hop = there
        return message if hop is None else write(sums(hop.back(message), hop), self.wire.combine)

    def _from_nodes(self, message: Message, plan: FewPlan) -> jax.Array:
        (y_md,), _ = read(_between_nodes(message))
        y_pnd = y_md.reshape(*plan.to_pn.shape, -1).astype(jnp.float32)
        return y_pnd.sum(0).astype(y_md.dtype)

    def _from_all(self, there: tuple[Message, Hop | PeerHop | None], plan: FewPlan) -> jax.Array:
        return self._from_nodes(self._from_devices(there, plan), plan)

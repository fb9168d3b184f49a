"""Layout of an exchange: its hops, planned from expert ids once per routing.

An exchange is one hop over all devices or two, over nodes and then inside a node. A hop sends each row once to each
peer that needs it. The last hop comes in rounds where a bound is given: of the rows that a device sends to a peer, a
round takes those whose first (token, expert) pair is within a window of `budget` pairs. So the rows that a device sends
and receives in a round, and the pairs of its experts, are bounded by the same number, whatever the routing; how many
rounds there are depends on the most loaded pair of devices.

Dims: n token of this device, k selected expert, p peer, m row at the source of a hop (of the first: token), s row to be
sent, r row received, j destination of a token, c chunk.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.rows import sum_pairs
from deepseek_jax.parallel.exchange.ragged import Axis, Chunks, before, make_chunks, ragged_all_to_all
from deepseek_jax.parallel.exchange.wire import Message, Wire, read, write


def static(**kwargs: Any) -> Any:
    """A field that is no array, but part of the program."""
    return flax.struct.field(pytree_node=False, **kwargs)


@flax.struct.dataclass
class Hop:
    """Rows to be sent are in the order of their chunks, then of their tokens; so are the rows received."""

    token_s: jax.Array  # int32: row at the source of each row to be sent; m for none
    row_mj: jax.Array  # int32: rows to be sent of each row at the source, by destination; s for none
    chunks: Chunks
    axis: Axis = static()
    chunk: int = static()  # rows of a chunk at most
    implementation: str | None = static()

    @property
    def rows(self) -> int:
        """Rows that a device receives at most."""
        return self.chunk * self.chunks.size.shape[0]

    @property
    def live_r(self) -> jax.Array:
        """Which of the rows received are there."""
        return jnp.arange(self.rows) < self.chunks.recv_size.sum()

    def there(self, message: Message) -> tuple[Message, "Hop"]:
        """Rows at the source -> rows received, and the hop."""
        return send(for_peers(message, self), self), self

    def back(self, message: Message) -> Message:
        """Rows received -> rows as they were sent."""
        return send_back(message, self)


def plan_hop(
    to_mp: jax.Array,
    axis: Axis,
    most: int,
    chunk: int,
    implementation: str | None,
    counts_qp: jax.Array | None = None,
) -> Hop:
    """Row m goes to every peer p with `to_mp`: to at most `most` of them, and at most `chunk` rows to each.

    counts_qp: how many rows each device q sends to each peer, where that is known already.
    """
    m, p = to_mp.shape
    s = min(m * most, p * chunk)
    counts_p = to_mp.sum(0, dtype=jnp.int32)
    row_mp = before(counts_p, 0)[None] + jnp.cumsum(to_mp, 0, dtype=jnp.int32) - 1
    row_mp = jnp.where(to_mp, row_mp, s)
    token_m1 = jnp.arange(m, dtype=jnp.int32)[:, None]
    token_s = jnp.full((s,), m, jnp.int32).at[row_mp].set(token_m1, mode="drop")
    row_mj = row_mp if most == p else jnp.sort(row_mp, axis=1)[:, :most]
    if counts_qp is None:
        counts_qp = lax.all_gather(counts_p, axis)
    chunks = make_chunks(counts_qp, axis)
    return Hop(token_s, row_mj, chunks, axis, chunk, implementation)


def for_peers(message: Message, hop: Hop) -> Message:
    """Rows at the source -> rows to be sent; zeros where there is none."""
    return message.with_words(message.words_nw.at[hop.token_s].get(mode="fill", fill_value=0))


def send(message: Message, hop: Hop) -> Message:
    """Rows to be sent -> rows received."""
    where = (hop.chunk, hop.axis, hop.implementation)
    return message.with_words(ragged_all_to_all(message.words_nw, hop.chunks, hop.rows, *where))


def send_back(message: Message, hop: Hop) -> Message:
    """Rows received -> rows as they were sent."""
    s, where = len(hop.token_s), (hop.chunk, hop.axis, hop.implementation)
    return message.with_words(ragged_all_to_all(message.words_nw, hop.chunks.reverse(), s, *where))


def sums(message: Message, hop: Any, dtype: Any = None) -> tuple[jax.Array, ...]:
    """Rows as they were sent -> sums of the values of each row at the source, added up in float32.

    dtype: of the sums, if not that of the values.
    """
    return tuple(sum_pairs(x.astype(dtype or x.dtype), hop.row_mj) for x in read(message)[0])


# --- plans --------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Rounds:
    """The last hop in rounds of `budget` pairs from each device to each peer."""

    pairs_mp: jax.Array  # int32: pairs of each row at the source of the last hop at each peer
    needed: jax.Array  # int32 []: rounds of the most loaded pair of devices; the same on all devices
    # int32: rows that device q sends to peer p in round i. Known beforehand: what waits in a branch or a loop exchanges no
    # counts, which XLA for CPUs may confuse with those of another plan
    counts_iqp: jax.Array
    budget: int = static()
    most: int = static()  # peers of a row

    def hop(self, i: jax.Array | int, axis: Axis, implementation: str | None) -> Hop:
        """The last hop of round i."""
        here_mp = (self.pairs_mp > 0) & (before(self.pairs_mp, 0) // self.budget == i)
        chunk = min(len(here_mp), self.budget)
        return plan_hop(
            here_mp,
            axis,
            self.most,
            chunk,
            implementation,
            self.counts_iqp.at[i].get(mode="fill", fill_value=0),
        )


@flax.struct.dataclass
class Plan:
    """The last of `hops` is that of the first round."""

    hops: tuple[Hop, ...]
    wire: Wire = static()
    experts_nk: jax.Array | None = None  # int32: physical ids, which travel with the tokens
    fits_n: jax.Array | None = (
        None  # bool: the token's experts lie on no more peers than `make_plan` was told
    )
    rounds: Rounds | None = None  # None: one round holds whatever there is
    n_local: int = static(default=0)
    pairs: int = static(default=0)  # of this device's experts in a round, at most

    def at_round(self, i: jax.Array | int) -> "Plan":
        """The plan with the last hop of round i."""
        assert self.rounds is not None
        last = self.rounds.hop(i, self.hops[-1].axis, self.hops[-1].implementation)
        return self.replace(hops=(*self.hops[:-1], last))  # type: ignore[attr-defined]

    @property
    def rank(self) -> jax.Array:
        """Where this device stands among those that hold experts."""
        return lax.axis_index(mesh_axes(tuple(hop.axis for hop in self.hops)))


def mesh_axes(hops: tuple[Axis, ...]) -> tuple[str, ...]:
    """The mesh axes of all hops."""
    return tuple(a for axis in hops for a in ((axis,) if isinstance(axis, str) else axis))


def pairs_at(ids_mk: jax.Array, first: jax.Array | int, below: int, p: int) -> jax.Array:
    """How many of each row's experts lie at each of p peers, which hold `below` each, from expert `first` on [m, p]."""
    peer_mk = (ids_mk - first) // below  # outside of 0 ... p - 1: absent, or of another group of peers
    return (peer_mk[..., None] == jnp.arange(p)[None, None]).sum(1, dtype=jnp.int32)


def make_plan(
    axes: tuple[Axis, ...],
    experts_nk: jax.Array,
    n_local: int,
    wire: Wire,
    most: int | None = None,
    receive: float | None = None,
    implementation: str | None = None,
) -> Plan:
    """The layout for physical expert ids int32 [n, k] with `n_local` experts on each device; others are absent.

    axes: of each hop, coarse to fine.
    most: on how many peers of the first hop a token's experts lie at most, where the routing is limited
      (`placement.nodes_per_token`); None for no limit. A token with more has `fits_n` False and goes nowhere.
    receive: pairs per token that a round brings to a device, see `MeshConfig.receive`; None for one round.
    """
    n, k = experts_nk.shape
    peers = [lax.axis_size(axis) for axis in axes]
    limits = [min(k, p) for p in peers]  # peers that a row goes to, at most
    limits[0] = min(limits[0], most or k)
    below = n_local * math.prod(peers[1:])  # experts of each peer
    fits_n = (pairs_at(experts_nk, 0, below, peers[0]) > 0).sum(1) <= limits[0]
    experts_nk = ids_mk = jnp.where(fits_n[:, None], experts_nk, -1)
    first, hops = jnp.int32(0), []  # expert of this device's group of peers, which each hop narrows
    for axis, p, limit in zip(axes[:-1], peers, limits, strict=False):
        hop = plan_hop(pairs_at(ids_mk, first, below, p) > 0, axis, limit, len(ids_mk), implementation)
        ((ids_mk,), _) = read(send(for_peers(write((ids_mk,), "same"), hop), hop))
        ids_mk = jnp.where(hop.live_r[:, None], ids_mk, -1)
        first = first + lax.axis_index(axis) * below
        hops.append(hop)
        below //= peers[len(hops)]
    pairs_mp, most_pairs = pairs_at(ids_mk, first, below, peers[-1]), min(k, n_local)  # of a row at a peer
    budget = None if receive is None else math.ceil(receive * n / peers[-1])
    last, rounds = _last_hop(pairs_mp, most_pairs, budget, axes, limits[-1], implementation)
    in_round = len(pairs_mp) * most_pairs if rounds is None else rounds.budget + most_pairs - 1
    return Plan((*hops, last), wire, experts_nk, fits_n, rounds, n_local, peers[-1] * in_round)


def _last_hop(
    pairs_mp: jax.Array,
    most_pairs: int,
    budget: int | None,
    axes: tuple[Axis, ...],
    most: int,
    how: str | None,
) -> tuple[Hop, Rounds | None]:
    """The last hop in one round, or the first of its rounds."""
    if budget is None or budget >= len(pairs_mp) * most_pairs:
        return plan_hop(pairs_mp > 0, axes[-1], most, len(pairs_mp), how), None
    pairs_mp = jnp.minimum(pairs_mp, most_pairs)
    most_loaded = lax.pmax(pairs_mp.sum(0).max(), mesh_axes(axes))
    in_round_mp = jnp.where(pairs_mp > 0, before(pairs_mp, 0) // budget, -1)
    all_rounds = jnp.arange(math.ceil(len(pairs_mp) * most_pairs / budget))[:, None, None]
    counts_ip = (in_round_mp[None] == all_rounds).sum(1, dtype=jnp.int32)
    counts_iqp = lax.all_gather(counts_ip, axes[-1], axis=1)
    rounds = Rounds(pairs_mp, (most_loaded + budget - 1) // budget, counts_iqp, budget, most)
    return rounds.hop(0, axes[-1], how), rounds

"""The all-to-all of expert parallelism: dropless, ragged, planned once per routing (report section 3.2.2).

Everything here runs inside `shard_map` (check_vma=False). Experts lie in order over the mesh axes (node, local,
tensor), of which the last two are the devices of a node. An exchange is one hop over all axes (`FLAT`) or two
(`TWO_HOP`): a token crosses to each node that it needs once, over `node`, to the device with its own index in the
node, and is forwarded inside the node. Partial sums take the way back: summed inside the node first, then they cross
once.

`make_plan` computes the layout from the expert ids; it serves forward, recomputation and backward. `dispatch`
brings rows to the devices of their experts, each row once per device; `combine` brings sums back. They are two
functions, so that a caller can place work between them, and each other's transpose: the backward pass of one is the
other, with the same plan and in the other's format.

Who applies the routing weight: the expert, before its down-projection (`model/experts.py`), and nobody else.
`dispatch` carries the weights along, `combine` is a plain sum. The one exception is the low-latency layout
(`parallel/low_latency.py`), whose experts know no weights: there the combine applies them.

Dims: n token of this device, d hidden, k selected expert, p peer, s row to be sent, r row received, j destination
of a token, c chunk, w 32-bit word of a message.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.experts import Travelled
from deepseek_jax.model.layers import Params
from deepseek_jax.parallel.ragged import IMPLEMENTATIONS, Axis, Chunks, before, make_chunks, ragged_all_to_all
from deepseek_jax.parallel.wire import SCALES, Layout, Wire, decode, encode, pack, unpack

INSIDE = ("local", "tensor")  # of a node
FLAT: tuple[Axis, ...] = (("node", *INSIDE),)
TWO_HOP: tuple[Axis, ...] = ("node", INSIDE)
AS_IT_IS = Wire()


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What is static about an exchange. `axes`: the mesh axes of each hop, coarse to fine.

    `implementation`: None picks by platform when the program is lowered; "native" (`lax.ragged_all_to_all`) is to
    be named for topologies without devices, "dense" is the exact emulation.
    """

    axes: tuple[Axis, ...] = TWO_HOP
    wire: Wire = AS_IT_IS
    implementation: str | None = None

    def __post_init__(self):
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation={self.implementation!r} is not one of {list(IMPLEMENTATIONS)}")


# --- plans ----------------------------------------------------------------------------------------------------


class Hop(NamedTuple):
    """The layout of one hop. Rows to be sent are in the order of their chunks, then of their tokens."""

    token_s: jax.Array  # int32: token of each row to be sent; n for none
    row_nj: jax.Array  # int32: rows of each token, in the order of their destinations; s for none
    counts_pc: jax.Array  # int32: rows of each chunk of each device
    chunks: Chunks

    @property
    def tokens(self) -> int:
        return self.row_nj.shape[0]

    @property
    def rows(self) -> int:
        """Rows that a device may receive, whatever the routing: nothing is dropped."""
        return self.tokens * self.counts_pc.shape[1]


class Plan(NamedTuple):
    """Computed once per routing."""

    hops: tuple[Hop, ...]
    experts_rk: (
        jax.Array
    )  # int32: local expert ids of the rows received; -1 where absent or not of this device
    fits_n: jax.Array  # bool: the token's experts lie on no more peers than `make_plan` was told
    most_rows: jax.Array  # int32: rows that the device with the most receives; the same on all


def _make_hop(to_np: jax.Array, axis: Axis, most: int) -> Hop:
    """Row n goes to every peer p with `to_np`; to at most `most` of them."""
    n, p = to_np.shape
    s = n * most
    counts_p = to_np.sum(0, dtype=jnp.int32)
    row_np = before(counts_p, 0) + jnp.cumsum(to_np, 0, dtype=jnp.int32) - 1
    row_np = jnp.where(to_np, row_np, s)
    token_n1 = jnp.arange(n, dtype=jnp.int32)[:, None]
    token_s = jnp.full((s,), n, jnp.int32).at[row_np].set(token_n1, mode="drop")
    row_nj = row_np if most == p else jnp.sort(row_np, axis=1)[:, :most]
    counts_pp = lax.all_gather(counts_p, axis)
    return Hop(token_s, row_nj, counts_pp, make_chunks(counts_pp, axis))


def make_plan(ex: Exchange, experts_nk: jax.Array, n_local: int, most: int | None = None) -> Plan:
    """The layout for expert ids int32 [n, k] with `n_local` experts on each device; ids outside of the experts are absent.

    `most`: on how many peers of the first hop a token's experts lie at most, where the routing is limited
    (`experts.nodes_per_token`); None for no limit. A token with more has `fits_n` False, its result is undefined.
    """
    k = experts_nk.shape[1]
    ids, base = experts_nk, jnp.int32(0)  # of the experts of this device's group, which each hop narrows
    below = n_local * lax.axis_size(tuple(a for axis in ex.axes for a in _names(axis)))
    hops: list[Hop] = []
    fits_n = jnp.ones(experts_nk.shape[:1], bool)
    for axis in ex.axes:
        p = lax.axis_size(axis)
        below //= p  # experts of each peer's group
        peer_nk = (ids - base) // below  # outside of 0 ... p - 1: absent, or of another node
        to_np = (peer_nk[..., None] == jnp.arange(p)).any(1)
        limit = min(k, p, p if most is None or hops else most)
        if not hops:
            fits_n = to_np.sum(1) <= limit
            to_np &= jnp.cumsum(to_np, 1) <= limit  # one that does not fit takes nobody's place
        hop = _make_hop(to_np, axis, limit)
        live_r = jnp.arange(hop.rows) < hop.chunks.recv_size.sum()
        words_rk = _send(_for_peers(ids.astype(jnp.uint32), hop), hop, axis, ex)
        ids = jnp.where(live_r[:, None], words_rk.astype(jnp.int32), -1)
        base = base + lax.axis_index(axis) * below
        hops.append(hop)
    most_rows = hops[-1].counts_pc.sum(0).max()
    for axis in ex.axes[:-1]:
        most_rows = lax.pmax(most_rows, axis)
    local = ids - base
    return Plan(tuple(hops), jnp.where((local >= 0) & (local < n_local), local, -1), fits_n, most_rows)


def _names(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis


# --- hops -----------------------------------------------------------------------------------------------------


def _for_peers(x_nw: jax.Array, hop: Hop) -> jax.Array:
    """Rows of tokens -> rows to be sent; zeros where there is none."""
    return x_nw.at[hop.token_s].get(mode="fill", fill_value=0)


def _send(message_sw: jax.Array, hop: Hop, axis: Axis, ex: Exchange) -> jax.Array:
    return ragged_all_to_all(message_sw, hop.chunks, hop.rows, hop.tokens, axis, ex.implementation)


def _sum(x_sd: jax.Array, hop: Hop) -> jax.Array:
    """Sum of each token's rows in float32 -> [n, d] in the dtype of `x_sd`."""
    parts = (
        x_sd.at[hop.row_nj[:, j]].get(mode="fill", fill_value=0).astype(jnp.float32)
        for j in range(hop.row_nj.shape[1])
    )
    return functools.reduce(jnp.add, parts).astype(x_sd.dtype)


class Window(NamedTuple):
    """A part of what the last hop brings: rows first ... first + rows - 1 of a device, for every device."""

    first: jax.Array  # int32 []
    rows: int


def loaded(x_nd: jax.Array, extra: tuple[jax.Array, ...], form: str, plan: Plan) -> tuple[jax.Array, Layout]:
    """Messages [s, w] to be sent by the first hop of a dispatch, and their layout.

    Rows are encoded once, at their source; `extra` [n, ...] travels beside them as it is.
    """
    message, layout = pack((*encode(x_nd, form), *extra))
    return _for_peers(message, plan.hops[0]), layout


def forwarded(message_sw: jax.Array, plan: Plan, ex: Exchange) -> jax.Array:
    """All of a dispatch's collectives but the last: messages for the first hop -> messages for the last."""
    for hop, onward, axis in zip(plan.hops[:-1], plan.hops[1:], ex.axes, strict=False):
        message_sw = _for_peers(_send(message_sw, hop, axis, ex), onward)
    return message_sw


def arrive(message_sw: jax.Array, plan: Plan, ex: Exchange, window: Window | None = None) -> jax.Array:
    """The last collective of a dispatch -> messages received [r, w], or those of a window."""
    hop, axis = plan.hops[-1], ex.axes[-1]
    if window is None:
        return _send(message_sw, hop, axis, ex)
    chunks = make_chunks(hop.counts_pc, axis, window=window)
    most = min(hop.tokens, window.rows)
    return ragged_all_to_all(message_sw, chunks, window.rows, most, axis, ex.implementation)


def decoded(
    message_rw: jax.Array, layout: Layout, form: str, dtype: jnp.dtype, n_extra: int
) -> tuple[jax.Array, ...]:
    """Messages -> (rows [r, d] in `dtype`, *extra)."""
    parts = unpack(message_rw, layout)
    split = len(parts) - n_extra
    return decode(parts[:split], form, dtype), *parts[split:]


class Received(NamedTuple):
    """What a dispatch brings. `quantised`: the rows as they came, (E4M3 [r, d], scales), if that was in FP8."""

    x_rd: jax.Array
    weights_rk: jax.Array
    quantised: tuple[jax.Array, jax.Array] | None = None

    def tokens(self, p: Params, ex: Exchange) -> Any:
        """For the experts, which read them as they travelled if they would quantise them so themselves."""
        return self.x_rd if self.quantised is None else Travelled(self.x_rd, self.quantised, ex.wire.dispatch)


def as_received(message_rw: jax.Array, layout: Layout, form: str, dtype: jnp.dtype) -> Received:
    """Messages of rows and routing weights, opened."""
    *coded, weights_rk = unpack(message_rw, layout)
    x_rd = decode(coded, form, dtype)
    return Received(x_rd, weights_rk, (coded[0], coded[1]) if form in SCALES else None)


def _packed(
    values: tuple[jax.Array, ...], ex: Exchange
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, ...]]]:
    """Values on their way back, the first in the format of a combine -> messages, and how to open such messages."""
    message, layout = pack((*encode(values[0], ex.wire.combine), *values[1:]))
    dtype, n_extra = values[0].dtype, len(values) - 1
    return message, lambda message: decoded(message, layout, ex.wire.combine, dtype, n_extra)


def _back(
    message_rw: jax.Array, hop: Hop, axis: Axis, ex: Exchange, window: Window | None = None
) -> jax.Array:
    """A hop's collective, reversed: messages received [r, w] (of a window) -> [s, w], as they were sent."""
    chunks = hop.chunks if window is None else make_chunks(hop.counts_pc, axis, window=window)
    most = hop.tokens if window is None else min(hop.tokens, window.rows)
    return ragged_all_to_all(
        message_rw, chunks.reverse(), hop.token_s.shape[0], most, axis, ex.implementation
    )


def depart(
    values: tuple[jax.Array, ...], plan: Plan, ex: Exchange, window: Window | None = None
) -> tuple[jax.Array, ...]:
    """The first hop of a combine: results [r, ...] (of a window) -> [s, ...], zeros outside of the window."""
    message, opened = _packed(values, ex)
    return opened(_back(message, plan.hops[-1], ex.axes[-1], ex, window))


def _sums(values: tuple[jax.Array, ...], hop: Hop) -> tuple[jax.Array, ...]:
    return tuple(_sum(x, hop) for x in values)


def inbound(values: tuple[jax.Array, ...], plan: Plan, ex: Exchange) -> tuple[jax.Array, ...]:
    """The rest of a combine: rows [s, ...] of the last hop -> sums [n, ...] at the tokens' sources."""
    values = _sums(values, plan.hops[-1])
    for hop, axis in reversed(list(zip(plan.hops[:-1], ex.axes, strict=False))):
        message, opened = _packed(values, ex)
        values = _sums(opened(_back(message, hop, axis, ex)), hop)
    return values


# --- dispatch and combine -------------------------------------------------------------------------------------


class Trip(NamedTuple):
    """A way there or back in two stages, so that a caller can place work beside each: `last(first(ready))` -> values
    at the other end. `ready` are messages: the first collective can start at once."""

    ready: jax.Array
    first: Callable[[jax.Array], Any]
    last: Callable[[Any], Any]

    def whole(self) -> Any:
        return self.last(self.first(self.ready))


def _window(rows: int | None) -> Window | None:
    return None if rows is None else Window(jnp.int32(0), rows)


def _outwards(
    x_nd: jax.Array,
    extra: tuple[jax.Array, ...],
    plan: Plan,
    ex: Exchange,
    rows: int | None,
    opened: Callable[..., tuple[Any, ...]],
) -> Trip:
    form = ex.wire.dispatch
    message, layout = loaded(x_nd, extra, form, plan)

    def last(message):  # type: ignore[no-untyped-def]
        return opened(arrive(message, plan, ex, _window(rows)), layout, form, x_nd.dtype)

    return Trip(message, lambda message: forwarded(message, plan, ex), last)


def outwards(values: tuple[jax.Array, ...], plan: Plan, ex: Exchange, rows: int | None) -> Trip:
    """(Rows of tokens,) to the devices of their experts, in the format of a dispatch; the last hop is the last stage.

    `rows`: only the first so many rows of each device's last hop.
    """
    return _outwards(values[0], (), plan, ex, rows, functools.partial(decoded, n_extra=0))


def to_experts(values: tuple[jax.Array, ...], plan: Plan, ex: Exchange, rows: int | None) -> Trip:
    """`outwards` of (tokens, routing weights) -> `Received`."""
    return _outwards(values[0], values[1:], plan, ex, rows, as_received)


def from_experts(values: Any, plan: Plan, ex: Exchange, rows: int | None) -> Trip:
    """`homewards` of the gradient of a `Received`: of rows and weights."""
    return homewards(tuple(values[:2]), plan, ex, rows)


def homewards(values: tuple[jax.Array, ...], plan: Plan, ex: Exchange, rows: int | None) -> Trip:
    """Sums of results to their tokens, the first of `values` in the format of a combine; the last hop's way back is
    the first stage."""
    message, opened = _packed(values, ex)
    hops = list(zip(plan.hops, ex.axes, strict=True))

    def first(message):  # type: ignore[no-untyped-def]
        hop, axis = hops[-1]
        sums = _sums(opened(_back(message, hop, axis, ex, _window(rows))), hop)
        return sums if len(hops) == 1 else _packed(sums, ex)[0]

    def last(on_the_way):  # type: ignore[no-untyped-def]
        if len(hops) == 1:
            return on_the_way
        hop, axis = hops[0]
        return _sums(opened(_back(on_the_way, hop, axis, ex)), hop)

    return Trip(message, first, last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(x_nd: jax.Array, weights_nk: jax.Array, plan: Plan, ex: Exchange) -> Received:
    """Tokens and their routing weights (float32) to the devices of their experts -> ([r, d], [r, k]).

    Row r is of the experts `plan.experts_rk[r]`; rows that nobody sent are zeros. Formats: `ex.wire.dispatch`
    forwards, `ex.wire.combine` for the gradient.
    """
    return to_experts((x_nd, weights_nk), plan, ex, None).whole()


def _dispatch_bwd(ex, plan, g):  # type: ignore[no-untyped-def]
    return *from_experts(g, plan, ex, None).whole(), None


dispatch.defvjp(lambda x, weights, plan, ex: (dispatch(x, weights, plan, ex), plan), _dispatch_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(y_rd: jax.Array, plan: Plan, ex: Exchange) -> jax.Array:
    """Results of the rows received -> their plain sums [n, d] at the tokens' sources, summed in float32 per hop.

    Formats: `ex.wire.combine` forwards, `ex.wire.dispatch` for the gradient.
    """
    return homewards((y_rd,), plan, ex, None).whole()[0]


def _combine_bwd(ex, plan, g_nd):  # type: ignore[no-untyped-def]
    return *outwards((g_nd,), plan, ex, None).whole(), None


combine.defvjp(lambda y, plan, ex: (combine(y, plan, ex), plan), _combine_bwd)

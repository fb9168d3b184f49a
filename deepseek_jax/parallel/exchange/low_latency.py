"""Experts over a mesh for decoding: few tokens per device, fixed buffers, one hop, each expert's rows together.

Every expert has a buffer of (tokens per device x devices) rows, so nothing is dropped and no size depends on the
routing; its rows lie at the front, in the order of their senders, as a masked grouped product wants them. A token
travels once per selected expert, straight to its device. Experts do not know the routing weights: the combine
applies them at the token's source, in float32.

Runs inside `shard_map` (check_vma=False), with gradients. Dims: n token of this device, d hidden, f expert inner,
k selected expert, e expert of this device, m row of an expert's buffer, s = n * k pair.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.dispatch import Received
from deepseek_jax.model.experts import products
from deepseek_jax.model.layers import Params
from deepseek_jax.model.rows import ALIGNMENT, sort_rows
from deepseek_jax.parallel.exchange.dispatcher import FLAT, OverMesh
from deepseek_jax.parallel.exchange.hops import Hop, Plan
from deepseek_jax.parallel.exchange.ragged import make_chunks, ragged_all_to_all
from deepseek_jax.parallel.exchange.transport import dispatch
from deepseek_jax.parallel.exchange.wire import encode
from deepseek_jax.precision.product import sides, swiglu
from deepseek_jax.precision.sums import precision
from pallas_kernels.blocks import round_up
from pallas_kernels.groups import PADDING, Groups

# (expert params, x [e, m, d], rows of each expert [e]) -> [e, m, d]; rows from its number on may be anything finite
Masked = Callable[[Params, jax.Array, jax.Array], jax.Array]


def masked_experts(p: Params, x_emd: jax.Array, rows_e: jax.Array) -> jax.Array:
    """The experts' FFNs as dense products batched over experts: the portable `Masked`, whatever the rows."""
    del rows_e
    gate_up, w_down = (w.array(x_emd.dtype) for w in products(p))
    exact = precision(x_emd.dtype)
    gate_up = jax.tree.map(lambda w_edf: jnp.einsum("emd,edf->emf", x_emd, w_edf, precision=exact), gate_up)
    return jnp.einsum("emf,efd->emd", swiglu(*sides(gate_up)), w_down, precision=exact)


def grouped_experts(p: Params, x_emd: jax.Array, rows_e: jax.Array) -> jax.Array:
    """`masked_experts` by the weights' own grouped products, which skip tiles of rows that are not there. No gradient."""
    e, m, d = x_emd.shape
    room = round_up(m, ALIGNMENT)
    x_rd = jnp.pad(x_emd, ((0, 0), (0, room - m), (0, 0))).reshape(e * room, d)
    expert_em, row_em = jnp.indices((e, room), jnp.int32)
    groups = Groups(jnp.where(row_em < rows_e[:, None], expert_em, PADDING).reshape(-1), rows_e)
    w = products(p)
    gate_up = w.gate_up.fprop(w.gate_up.from_dispatch(x_rd), x_emd.dtype, groups)
    y_rd = w.down.fprop(w.down.swiglu(gate_up, None), x_emd.dtype, groups)
    return y_rd.reshape(e, room, d)[:, :m]


def decoding_experts(p: Params, x_emd: jax.Array, rows_e: jax.Array) -> jax.Array:
    """The `Masked` of generation: grouped GEMMs on GPUs, a batched product elsewhere. No gradient."""
    return lax.platform_dependent(p, x_emd, rows_e, cuda=grouped_experts, default=masked_experts)


class FewPlan(NamedTuple):
    """A plan of one hop, and the rows of each expert of this device [e]."""

    travel: Plan
    rows_e: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowLatency(OverMesh):
    """The dispatcher for few tokens. `masked`: one device's experts; `decoding_experts` where no gradient is wanted."""

    masked: Masked = masked_experts

    def _layout(self, experts_nk: jax.Array, n_local: int) -> FewPlan:
        (axis,), n = FLAT, len(experts_nk)
        devices = lax.axis_size(axis)
        rows = sort_rows(experts_nk, jnp.zeros(experts_nk.shape), n_local * devices, alignment=1)
        chunks = make_chunks(lax.all_gather(rows.sizes_e, axis), axis, stride=n * devices)
        hop = Hop(rows.token_m, rows.row_nk, chunks, axis, n, self.implementation)
        return FewPlan(Plan((hop,), self.wire), chunks.recv_size.reshape(-1, n_local).sum(0))

    def dispatch(self, x_nd: jax.Array, weights_nk: jax.Array, plan: FewPlan) -> Received:
        return dispatch(x_nd, weights_nk[:, :0], plan.travel)

    def experts(
        self, p: Params, came: Received, x_nd: jax.Array, weights_nk: jax.Array, plan: FewPlan
    ) -> tuple[jax.Array, jax.Array]:
        """(results [r, d], the weights for the combine)"""
        x_emd = came.x_rd.reshape(len(plan.rows_e), -1, x_nd.shape[1])
        y_emd = self.masked(p, x_emd, plan.rows_e)
        there_em = jnp.arange(x_emd.shape[1])[None] < plan.rows_e[:, None]
        return jnp.where(there_em[..., None], y_emd, 0).reshape(came.x_rd.shape), weights_nk

    def combine(self, y: tuple[jax.Array, jax.Array], plan: FewPlan) -> jax.Array:
        """sum_k weights_nk * y of the row that token n sent to its k-th expert -> [n, d]."""
        (y_rd, weights_nk), (hop,) = y, plan.travel.hops
        (sent,) = encode(y_rd, self.wire.combine)
        where = (hop.chunk, hop.axis, hop.implementation)
        back_sd = ragged_all_to_all(sent, hop.chunks.reverse(), len(hop.token_s), *where)
        y_nkd = back_sd.at[hop.row_mj].get(mode="fill", fill_value=0).astype(jnp.float32)
        exact = precision(jnp.float32)
        return jnp.einsum("nk,nkd->nd", weights_nk, y_nkd, precision=exact).astype(y_rd.dtype)

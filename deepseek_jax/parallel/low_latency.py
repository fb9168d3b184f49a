"""Experts over a mesh for decoding: few tokens per device, fixed buffers, one hop, each expert's rows together.

Every expert has a buffer of (tokens per device x devices) rows, so nothing is dropped and no size depends on the
routing; its rows lie at the front, in the order of their senders, as a masked grouped product wants them. A token
travels once per selected expert, straight to its device. Experts do not know the routing weights: the combine
applies them at the token's source, in float32.

Runs inside `shard_map` (check_vma=False), with gradients. Dims: n token of this device, d hidden, f expert inner,
k selected expert, e expert of this device, m row of an expert's buffer, s = n * k pair.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.layers import Params
from deepseek_jax.model.moe import Experts
from deepseek_jax.model.router import expert_counts
from deepseek_jax.model.rows import ALIGNMENT
from deepseek_jax.parallel.exchange import AS_IT_IS, FLAT, Exchange, Hop, Plan, dispatch
from deepseek_jax.parallel.ragged import make_chunks, ragged_all_to_all
from deepseek_jax.parallel.wire import Wire, encode
from deepseek_jax.precision.product import swiglu
from deepseek_jax.precision.sums import precision
from pallas_kernels.blocks import round_up
from pallas_kernels.grouped_gemm.ops import grouped_gemm
from pallas_kernels.groups import PADDING

# (expert params, x [e, m, d], rows of each expert [e]) -> [e, m, d]; rows from its number on may be anything finite
Masked = Callable[[Params, jax.Array, jax.Array], jax.Array]


def masked_experts(p: Params, x_emd: jax.Array, rows_e: jax.Array) -> jax.Array:
    """The experts' FFNs as dense products batched over experts: the portable `Masked`, whatever the rows."""
    del rows_e
    w_gate, w_up, w_down = (p[name].astype(x_emd.dtype) for name in ("w_gate_edf", "w_up_edf", "w_down_efd"))
    exact = precision(x_emd.dtype)
    gate_emf, up_emf = (jnp.einsum("emd,edf->emf", x_emd, w, precision=exact) for w in (w_gate, w_up))
    return jnp.einsum("emf,efd->emd", swiglu(gate_emf, up_emf), w_down, precision=exact)


def grouped_experts(p: Params, x_emd: jax.Array, rows_e: jax.Array) -> jax.Array:
    """`masked_experts` by grouped GEMMs, which skip tiles of rows that are not there. No gradient."""
    e, m, d = x_emd.shape
    room = round_up(m, ALIGNMENT)
    x_rd = jnp.pad(x_emd, ((0, 0), (0, room - m), (0, 0))).reshape(e * room, d)
    expert_em, row_em = jnp.indices((e, room), jnp.int32)
    group_r = jnp.where(row_em < rows_e[:, None], expert_em, PADDING).reshape(-1)

    def product(a_rx: jax.Array, name: str) -> jax.Array:
        w = p[name].astype(a_rx.dtype)
        return grouped_gemm(a_rx, w, group_r, transpose_b=False, alignment=ALIGNMENT)

    act_rf = swiglu(product(x_rd, "w_gate_edf"), product(x_rd, "w_up_edf"))
    return product(act_rf, "w_down_efd").reshape(e, room, d)[:, :m]


def decoding_experts(p: Params, x_emd: jax.Array, rows_e: jax.Array) -> jax.Array:
    """The `Masked` of generation: grouped GEMMs on GPUs, a batched product elsewhere. No gradient."""
    return lax.platform_dependent(p, x_emd, rows_e, cuda=grouped_experts, default=masked_experts)


def sort_pairs(experts_nk: jax.Array, n_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stable sort of the pairs by expert, without padding: (token [s], place [n, k] of each pair, pairs [e]).

    Pairs of absent experts (ids outside [0, e)) come last: their token is n, their place s.
    """
    n, k = experts_nk.shape
    flat = experts_nk.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < n_experts), flat, n_experts)
    pair_s = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(pair_s).at[pair_s].set(jnp.arange(n * k, dtype=jnp.int32))
    token_s = jnp.where(flat[pair_s] < n_experts, pair_s // k, n)
    place_nk = jnp.where(flat < n_experts, place, n * k).reshape(n, k)
    return token_s, place_nk, expert_counts(flat, n_experts)


def low_latency_plan(ex: Exchange, experts_nk: jax.Array, n_local: int) -> tuple[Plan, jax.Array]:
    """The layout for expert ids int32 [n, k] (outside of the experts: absent), and the rows of each local expert."""
    (axis,) = ex.axes
    n = len(experts_nk)
    token_s, place_nk, pairs_e = sort_pairs(experts_nk, n_local * lax.axis_size(axis))
    counts_pc = lax.all_gather(pairs_e, axis)
    per_expert = n * lax.axis_size(axis)
    chunks = make_chunks(counts_pc, axis, stride=per_expert)
    hop = Hop(token_s, place_nk, counts_pc, chunks)
    rows_e = chunks.recv_size.reshape(-1, n_local).sum(0)
    expert_em, row_em = jnp.indices((n_local, per_expert), jnp.int32)
    ids_r1 = jnp.where(row_em < rows_e[:, None], expert_em, -1).reshape(-1, 1)
    most_rows = counts_pc.sum(0).reshape(-1, n_local).sum(1).max()
    return Plan((hop,), ids_r1, jnp.ones((n,), bool), most_rows), rows_e


def combine_weighted(y_rd: jax.Array, weights_nk: jax.Array, plan: Plan, ex: Exchange) -> jax.Array:
    """sum_k weights_nk * y of the row that token n sent to its k-th expert -> [n, d]."""
    (hop,), (axis,) = plan.hops, ex.axes
    (sent,) = encode(y_rd, ex.wire.combine)
    back_sd = ragged_all_to_all(
        sent, hop.chunks.reverse(), hop.token_s.shape[0], hop.tokens, axis, ex.implementation
    )
    y_nkd = back_sd.at[hop.row_nj].get(mode="fill", fill_value=0).astype(jnp.float32)
    exact = precision(jnp.float32)
    return jnp.einsum("nk,nkd->nd", weights_nk, y_nkd, precision=exact).astype(y_rd.dtype)


def low_latency_experts(
    *, masked: Masked = masked_experts, wire: Wire = AS_IT_IS, implementation: str | None = None
) -> Experts:
    """The `experts` argument of a forward pass with few tokens, for use inside `shard_map`.

    Args:
      masked: the computation of one device's experts; `decoding_experts` where no gradient is wanted.
      wire: formats of dispatch and combine; by default arrays as they are.
      implementation: of the collective, see `exchange.Exchange`.
    """
    ex = Exchange(FLAT, wire, implementation)

    def experts(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
        n_local = p["w_gate_edf"].shape[0]
        plan, rows_e = low_latency_plan(ex, experts_nk, n_local)
        x_rd = dispatch(x_nd, jnp.zeros((len(x_nd), 0), jnp.float32), plan, ex).x_rd
        y_emd = masked(p, x_rd.reshape(n_local, -1, x_nd.shape[1]), rows_e)
        y_rd = jnp.where(plan.experts_rk >= 0, y_emd.reshape(x_rd.shape), 0)
        return combine_weighted(y_rd, weights_nk, plan, ex)

    return experts

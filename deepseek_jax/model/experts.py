"""Routed experts on one device: dropless, at a cost proportional to the (token, expert) pairs routed.

Training and prefill sort the pairs by expert (`rows.py`) and run each expert over its rows (`ffn.py`). In FP8, the input
is quantised per token before it is copied to its experts' rows, and so is the gradient of the output: these travel
between devices. Decoding does the same; on a CPU, it runs each chosen expert over all of its few tokens.

Dims: n token, k selected expert, d hidden, f expert inner, e expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.ffn import Gated, ffn_dgrad, ffn_fprop, ffn_wgrad, mlp
from deepseek_jax.model.layers import Params
from deepseek_jax.model.params import Param, layers_apart
from deepseek_jax.model.rows import Rows, masked_rows, sort_rows, sum_pairs
from deepseek_jax.model.weights import beside
from deepseek_jax.precision.product import product

# On a CPU, up to FEW_ROWS tokens, a chosen expert runs over all: reading its weights takes longer. Where experts lie apart, that
# is so up to ALL_ROWS; up to APART_ROWS each runs over its own rows, BLOCK_ROWS or half as many at a time.
FEW_ROWS, ALL_ROWS, APART_ROWS, BLOCK_ROWS = 64, 16, 256, 32


def expert_params(cfg: ModelConfig) -> dict[str, Param]:
    e, d, f = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
    return {
        "w_gate_edf": Param((e, d, f), ("expert", "embed", "expert_mlp"), n_in=1),
        "w_up_edf": Param((e, d, f), ("expert", "embed", "expert_mlp"), n_in=1),
        "w_down_efd": Param((e, f, d), ("expert", "expert_mlp", "embed"), n_in=1),
    }


def _keeps_rows(rows: Rows) -> bool:
    """Whether the backward pass gets the sorted rows, not the tokens of which it would make them again: where there are
    hardly more rows than tokens, as on a device to which an exchange brings those of its few experts."""
    return len(rows.token_m) <= 1.25 * len(rows.row_nk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _routed(x_nd, weights_nk, experts_nk, w, sent, form, pairs):  # type: ignore[no-untyped-def]
    return _routed_fwd(x_nd, weights_nk, experts_nk, w, sent, form, pairs)[0]


def _routed_fwd(x_nd, weights_nk, experts_nk, w, sent, form, pairs):  # type: ignore[no-untyped-def]
    rows = sort_rows(experts_nk, weights_nk, w.gate_up.experts, pairs)
    a = w.gate_up.from_dispatch(x_nd, sent, form)
    a_m = w.gate_up.take(a, rows.token_m)
    y_md, kept = ffn_fprop(w, a_m, x_nd.dtype, rows)
    a = w.gate_up.kept(a_m if _keeps_rows(rows) else a)
    return sum_pairs(y_md, rows.row_nk), (a, kept, rows, w.kept_for_backward())


def _routed_bwd(form, pairs, saved, dy_nd):  # type: ignore[no-untyped-def]
    a, kept, rows, w = saved
    dy_m = w.down.take(w.down.gradient_from_dispatch(dy_nd), rows.token_m)
    dx_md, dgain_m, at = ffn_dgrad(w, kept, dy_m, dy_nd.dtype, rows)
    a_m = a if _keeps_rows(rows) else w.gate_up.take(a, rows.token_m)
    dw = ffn_wgrad(w, a_m, at, dy_m, rows)
    dweights = dgain_m.at[rows.row_nk].get(mode="fill", fill_value=0)
    return sum_pairs(dx_md, rows.row_nk), dweights, None, dw, None


_routed.defvjp(_routed_fwd, _routed_bwd)


def routed_experts(
    p: Params,
    x_nd: jax.Array,
    experts_nk: jax.Array,
    weights_nk: jax.Array,
    *,
    sent: tuple[jax.Array, jax.Array] | None = None,
    form: str = "",
    pairs: int | None = None,
) -> jax.Array:
    """sum_k weights_nk * FFN_{experts_nk}(x_n) -> [n, d]: the training form, differentiable, dropless.

    x_nd in the compute dtype; experts_nk int32, an id outside [0, e) marks an absent pair; weights_nk float32. `sent`:
    the tokens as they travelled, (E4M3 [n, d], scales), in the wire's `form`: where the experts would quantise x so
    themselves, they read these. The gradient is that of x_nd, the same numbers. pairs: that are present at most.
    """
    return _routed(x_nd, weights_nk, experts_nk, products(p), sent, form, pairs)


def products(p: Params) -> Gated:
    """Of the experts' weights, for `ffn.py`."""
    return Gated(beside(p, "w_gate_up_edf"), product(p["w_down_efd"]))


def arrived_experts(
    p: Params,
    x_nd: jax.Array,
    experts_nk: jax.Array,
    weights_nk: jax.Array,
    *,
    sent: tuple[jax.Array, jax.Array] | None = None,
    form: str = "",
) -> jax.Array:
    """`routed_experts` for the rows that a device can receive while decoding, most of which are not there. No gradient.

    Where a device has no more experts than a token chooses, each has room for every row: what must be held for the
    worst routing is no more than if the rows were sorted.
    """
    w = products(p)
    order = masked_rows if w.down.experts <= experts_nk.shape[1] else sort_rows
    rows = order(experts_nk, weights_nk, w.down.experts)
    a_m = w.gate_up.take(w.gate_up.from_dispatch(x_nd, sent, form), rows.token_m)
    return sum_pairs(ffn_fprop(w, a_m, x_nd.dtype, rows)[0], rows.row_nk)


# --- few tokens (decoding) ----------------------------------------------------------------------------------------


def _as_ffns(p: Params) -> Params:
    """The routed experts as stacked parameters of `ffn.mlp`."""
    names = {
        "w_gate_edf": "w_gate_df",
        "w_up_edf": "w_up_df",
        "w_gate_up_edf": "w_gate_up_df",
        "w_down_efd": "w_down_fd",
    }
    return {name: p[of_experts] for of_experts, name in names.items() if of_experts in p}


def experts_apart(p: Params) -> list[Params]:
    """The routed experts as FFNs in arrays of their own, parameters of `ffn.mlp`."""
    return layers_apart(_as_ffns(p), product(p["w_down_efd"]).experts)


def _gains(experts_nk: jax.Array, weights_nk: jax.Array, n_experts: int) -> tuple[jax.Array, jax.Array]:
    """Routing weights [n, e], mostly zero; and which experts a token chose."""
    chosen_nke = experts_nk[..., None] == jnp.arange(n_experts)[None, None]
    return jnp.where(chosen_nke, weights_nk[..., None], 0).sum(1), chosen_nke.any((0, 1))


def _one_by_one(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """Each expert that a token chose, over all tokens."""
    gain_ne, used_e = _gains(experts_nk, weights_nk, product(p["w_down_efd"]).experts)
    order = jnp.argsort(~used_e, stable=True)

    def add(i: jax.Array, y_nd: jax.Array) -> jax.Array:
        e = order[i]
        one = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, e, keepdims=False), _as_ffns(p))
        return y_nd + mlp(one, x_nd) * gain_ne[:, e, None].astype(x_nd.dtype)

    return lax.fori_loop(0, used_e.sum(), add, jnp.zeros_like(x_nd))


def _if_chosen(
    apart: list[Params], x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array
) -> jax.Array:
    """`_one_by_one` without a loop, whose every expert is copied out of the stack: weights are read where they are."""
    gain_ne, used_e = _gains(experts_nk, weights_nk, len(apart))

    @jax.jit  # traced once for all experts
    def run(p: Params, x_nd: jax.Array, gain_n: jax.Array) -> jax.Array:
        return mlp(p, x_nd) * gain_n[:, None].astype(x_nd.dtype)

    def one(i: int) -> jax.Array:
        return lax.cond(used_e[i], run, lambda *_: jnp.zeros_like(x_nd), apart[i], x_nd, gain_ne[:, i])

    return functools.reduce(jnp.add, map(one, range(len(apart))))


def _in_blocks(
    apart: list[Params], x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array
) -> jax.Array:
    """Each expert over its own rows, some at a time, with its weights where they are."""
    rows_each = BLOCK_ROWS if experts_nk.size > len(apart) * BLOCK_ROWS // 2 else BLOCK_ROWS // 2
    rows = sort_rows(experts_nk, weights_nk, len(apart), alignment=rows_each)
    blocks_e = -(-rows.sizes_e // rows_each)
    first_e = (jnp.cumsum(blocks_e) - blocks_e) * rows_each

    @jax.jit  # traced once for all experts
    def over_rows(
        p: Params, x_nd: jax.Array, rows: Rows, first: jax.Array, blocks: jax.Array, y_md: Any
    ) -> Any:
        def block(i: jax.Array, y_md: jax.Array) -> jax.Array:
            start = first + i * rows_each
            token_r, gain_r = (
                lax.dynamic_slice_in_dim(x, start, rows_each) for x in (rows.token_m, rows.gain_m)
            )
            y_rd = mlp(p, x_nd.at[token_r].get(mode="fill", fill_value=0))
            return lax.dynamic_update_slice_in_dim(
                y_md, y_rd * gain_r[:, None].astype(y_rd.dtype), start, axis=0
            )

        return lax.fori_loop(0, blocks, block, y_md)

    y_md = jnp.zeros((len(rows.token_m), x_nd.shape[1]), x_nd.dtype)
    for e, p in enumerate(apart):
        y_md = over_rows(p, x_nd, rows, first_e[e], blocks_e[e], y_md)
    return sum_pairs(y_md, rows.row_nk)


def decode_experts(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """The same function for decoding. `p` may hold the experts `apart`, too, which few tokens then read."""
    if len(x_nd) > (APART_ROWS if "apart" in p else FEW_ROWS):
        return routed_experts(p, x_nd, experts_nk, weights_nk)
    if "apart" in p:
        form = _if_chosen if len(x_nd) <= ALL_ROWS else _in_blocks
        return form(p["apart"], x_nd, experts_nk, weights_nk)
    return lax.platform_dependent(p, x_nd, experts_nk, weights_nk, cpu=_one_by_one, default=routed_experts)

"""Routed experts on one device: dropless, at a cost proportional to the (token, expert) pairs routed.

Training and prefill sort the pairs by expert (`rows.py`) and run each expert over its rows (`ffn.py`). In FP8, the input
is quantised per token before it is copied to its experts' rows, and so is the gradient of the output: these travel
between devices. Decoding, with few tokens, gathers weights or runs all experts densely.

Dims: n token, k selected expert, d hidden, f expert inner, e expert.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.ffn import Gated, ffn_dgrad, ffn_fprop, ffn_wgrad, gated
from deepseek_jax.model.layers import Params
from deepseek_jax.model.params import Param
from deepseek_jax.model.rows import sort_rows, sum_pairs
from deepseek_jax.precision.product import swiglu
from deepseek_jax.precision.sums import precision

DENSE_ROWS = 64  # up to this many tokens all experts run densely: weights are read once, work is small


def expert_params(cfg: ModelConfig) -> dict[str, Param]:
    e, d, f = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
    return {
        "w_gate_edf": Param((e, d, f), ("expert", "embed", "expert_mlp"), n_in=1),
        "w_up_edf": Param((e, d, f), ("expert", "embed", "expert_mlp"), n_in=1),
        "w_down_efd": Param((e, f, d), ("expert", "expert_mlp", "embed"), n_in=1),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _routed(x_nd, weights_nk, experts_nk, w, sent, form, pairs):  # type: ignore[no-untyped-def]
    return _routed_fwd(x_nd, weights_nk, experts_nk, w, sent, form, pairs)[0]


def _routed_fwd(x_nd, weights_nk, experts_nk, w, sent, form, pairs):  # type: ignore[no-untyped-def]
    rows = sort_rows(experts_nk, weights_nk, w.gate.experts, pairs)
    a = w.gate.from_dispatch(x_nd, sent, form)
    a_m = w.gate.take(a, rows.token_m, rows.real_m1)
    y_md, kept = ffn_fprop(w, a_m, x_nd.dtype, rows)
    return sum_pairs(y_md, rows.row_nk), (w.gate.kept(a), kept, rows, w.kept_for_backward())


def _routed_bwd(form, pairs, saved, dy_nd):  # type: ignore[no-untyped-def]
    a, kept, rows, w = saved
    dy_m = w.down.take(w.down.gradient_from_dispatch(dy_nd), rows.token_m, rows.real_m1)
    dx_md, dgain_m, at = ffn_dgrad(w, kept, dy_m, dy_nd.dtype, rows)
    dw = ffn_wgrad(w, w.gate.take(a, rows.token_m, rows.real_m1), at, dy_m, rows)
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
    return _routed(x_nd, weights_nk, experts_nk, _products(p), sent, form, pairs)


def _products(p: Params) -> Gated:
    return gated(p["w_gate_edf"], p["w_up_edf"], p["w_down_efd"])


# --- few tokens (decoding) ----------------------------------------------------------------------------------------


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=precision(a.dtype))


def _gathered(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """One copy of each selected expert's weights per pair: for fewer pairs than experts (decoding)."""
    w_gate, w_up, w_down = (
        p[name][experts_nk].astype(x_nd.dtype) for name in ("w_gate_edf", "w_up_edf", "w_down_efd")
    )
    act = swiglu(_dot("nd,nkdf->nkf", x_nd, w_gate), _dot("nd,nkdf->nkf", x_nd, w_up))
    return _dot("nkf,nkfd->nd", act * weights_nk[..., None].astype(x_nd.dtype), w_down)


def _by_pairs(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """`_gathered`, one pair after the other, whose expert's weights are read where they are: on CPUs the copies of a
    gather take several times as long as the products."""
    n, k = experts_nk.shape

    def one(pair: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x_d, expert, weight = pair
        w_gate, w_up, w_down = (
            lax.dynamic_index_in_dim(p[name], expert, keepdims=False).astype(x_nd.dtype)
            for name in ("w_gate_edf", "w_up_edf", "w_down_efd")
        )
        return (swiglu(x_d[None] @ w_gate, x_d[None] @ w_up) * weight) @ w_down

    pairs = (jnp.repeat(x_nd, k, axis=0), experts_nk.reshape(-1), weights_nk.reshape(-1).astype(x_nd.dtype))
    return lax.map(one, pairs).reshape(n, k, -1).sum(1)


def _dense(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """All experts for all tokens, weighted by gates that are mostly zero: for batched decoding.

    The product is batched over experts, so the weights are read where they are.
    """
    w_gate, w_up, w_down = (p[name].astype(x_nd.dtype) for name in ("w_gate_edf", "w_up_edf", "w_down_efd"))
    e = w_gate.shape[0]
    gate_ne = (
        jax.nn.one_hot(experts_nk, e, dtype=x_nd.dtype) * weights_nk[..., None].astype(x_nd.dtype)
    ).sum(1)
    x_end = jnp.broadcast_to(x_nd, (e, *x_nd.shape))
    act = swiglu(_dot("end,edf->enf", x_end, w_gate), _dot("end,edf->enf", x_end, w_up))
    return _dot("enf,efd->end", act * gate_ne.T[..., None], w_down).sum(0)


def decode_experts(p: Params, x_nd: jax.Array, experts_nk: jax.Array, weights_nk: jax.Array) -> jax.Array:
    """The same function for few tokens; picks the form by the number of pairs. All ids must be present."""
    n_experts = p["w_gate_edf"].shape[0]
    if experts_nk.size < n_experts:
        return lax.platform_dependent(p, x_nd, experts_nk, weights_nk, cpu=_by_pairs, default=_gathered)
    if x_nd.shape[0] <= DENSE_ROWS:
        return _dense(p, x_nd, experts_nk, weights_nk)
    return routed_experts(p, x_nd, experts_nk, weights_nk)

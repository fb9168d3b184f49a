"""RMSNorm, linear layers, SwiGLU FFN, embedding and output head.

Dims: b batch, t token, d hidden, f FFN inner, v vocabulary, n flattened tokens.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.params import Param
from deepseek_jax.model.sums import precision
from deepseek_jax.model.swiglu import SWIGLU_INPUTS, swiglu
from deepseek_jax.precision import linear as quantised

Params = Any

# Name of what every recompute policy keeps: where each token's row goes, small and made by communication.
EXPERT_PLAN = "expert_plan"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last dim, in float32; result in the dtype of `x` [..., d]; `scale` [d].

    The backward pass computes everything from `x` and `scale` again.
    """
    return (_normed(x, eps)[0] * scale.astype(jnp.float32)).astype(x.dtype)


def _normed(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x by its root mean square, and the inverse of the latter; float32."""
    x32 = x.astype(jnp.float32)
    inv = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32 * inv, inv


def _rms_norm_bwd(eps, saved, g):  # type: ignore[no-untyped-def]
    x, scale = saved
    (normed, inv), g32 = _normed(x, eps), g.astype(jnp.float32)
    d_scale = (g32 * normed).sum(tuple(range(x.ndim - 1)))
    d_normed = g32 * scale.astype(jnp.float32)
    dx = inv * (d_normed - normed * (d_normed * normed).mean(-1, keepdims=True))
    return dx.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(lambda x, scale, eps: (rms_norm(x, scale, eps), (x, scale)), _rms_norm_bwd)


def linear(x: jax.Array, w: Any, n_in: int = 1, dtype: Any = None) -> jax.Array:
    """Contract the last `n_in` dims of x with the first `n_in` dims of w, both cast to `dtype` (default: x's).

    `w` is an array, or brings its own product along: a quantised `precision.linear.Weight`.

    One two-dimensional product: with several batch dims left in, XLA transposes the operands of the weight
    gradient through memory.
    """
    if hasattr(w, "multiply"):
        return w.multiply(x, n_in)
    return _linear(x, w, n_in, dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(x: jax.Array, w: jax.Array, n_in: int, dtype: Any) -> jax.Array:
    """Saves its arguments as they are: cast or reshaped, a layer's weight would be saved a second time."""
    x_mi, w_io = _matrices(x, w, n_in, dtype)
    y_mo = jnp.matmul(x_mi, w_io, precision=precision(dtype))
    return y_mo.reshape(*x.shape[: x.ndim - n_in], *w.shape[n_in:])


def _matrices(x: jax.Array, w: jax.Array, n_in: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """[m, in] and [in, out] in `dtype`."""
    width = math.prod(w.shape[:n_in])
    return x.astype(dtype).reshape(-1, width), w.astype(dtype).reshape(width, -1)


def _linear_bwd(n_in, dtype, saved, g):  # type: ignore[no-untyped-def]
    x, w = saved
    x_mi, w_io = _matrices(x, w, n_in, dtype)
    g_mo = g.reshape(-1, w_io.shape[1])
    exact = precision(dtype)
    dx_mi = jnp.matmul(g_mo, w_io.T, precision=exact)
    tokens = (((0,), (0,)), ((), ()))
    dw_io = lax.dot_general(x_mi, g_mo, tokens, precision=exact, preferred_element_type=jnp.float32)
    return dx_mi.reshape(x.shape).astype(x.dtype), dw_io.reshape(w.shape).astype(w.dtype)


_linear.defvjp(lambda x, w, n_in, dtype: (_linear(x, w, n_in, dtype), (x, w)), _linear_bwd)


def mlp_params(d: int, f: int) -> dict[str, Param]:
    """Dense SwiGLU FFN; also the shared experts, merged into one of inner width n_shared * f."""
    return {
        "w_gate_df": Param((d, f), ("embed", "mlp"), n_in=1),
        "w_up_df": Param((d, f), ("embed", "mlp"), n_in=1),
        "w_down_fd": Param((f, d), ("mlp", "embed"), n_in=1),
    }


def mlp(p: Params, x: jax.Array) -> jax.Array:
    """w_down(silu(w_gate x) * w_up x): [..., d] -> [..., d]."""
    if isinstance(p["w_gate_df"], quantised.Weight):
        return quantised.mlp(x, p["w_gate_df"], p["w_up_df"], p["w_down_fd"])
    gate, up = (checkpoint_name(linear(x, p[name]), SWIGLU_INPUTS) for name in ("w_gate_df", "w_up_df"))
    return linear(swiglu(gate, up), p["w_down_fd"])


def embed_params(cfg: ModelConfig) -> dict[str, Param]:
    return {"w_embed_vd": Param((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))}


def embed(p: Params, cfg: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Token ids int32 [...] -> embeddings [..., d] in the compute dtype."""
    return _embed(p["w_embed_vd"], tokens, cfg.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _embed(w_vd: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Backward, the gradients of an id's occurrences are added up in float32: in BF16, the sum of 4,096 ones is 256.

    On GPUs the additions of a scatter come in any order, unless `train.deterministic` is set.
    """
    return w_vd[tokens].astype(dtype)


def _embed_bwd(dtype, saved, g):  # type: ignore[no-untyped-def]
    w_vd, tokens = saved
    dw_vd = jnp.zeros(w_vd.shape, jnp.float32).at[tokens].add(g.astype(jnp.float32))
    return dw_vd.astype(w_vd.dtype), None


_embed.defvjp(lambda w_vd, tokens, dtype: (_embed(w_vd, tokens, dtype), (w_vd, tokens)), _embed_bwd)


def head_params(cfg: ModelConfig) -> dict[str, Param]:
    if cfg.tie_word_embeddings:
        return {}
    return {"w_head_dv": Param((cfg.hidden_size, cfg.vocab_size), ("embed", "vocab"))}


def head_weight(params: Params) -> jax.Array:
    """Output head [d, v]: its own tensor, or the transposed embedding when the two are tied."""
    if params.get("head"):
        return params["head"]["w_head_dv"]
    return params["embed"]["w_embed_vd"].T


def logits(params: Params, h: jax.Array) -> jax.Array:
    """Hidden states after the final norm [..., d] -> float32 logits [..., v]."""
    w_dv = head_weight(params).astype(h.dtype)
    exact = precision(h.dtype)
    return jnp.einsum("...d,dv->...v", h, w_dv, precision=exact, preferred_element_type=jnp.float32)

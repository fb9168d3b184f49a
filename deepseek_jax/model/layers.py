"""RMSNorm, linear layers, embedding and output head.

Dims: b batch, t token, d hidden, v vocabulary, m flattened tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.params import Param
from deepseek_jax.precision.product import product
from deepseek_jax.precision.sums import precision

Params = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last dim, in float32; result in the dtype of `x` [..., d]; `scale` [d].

    The backward pass computes everything from `x` and `scale` again.
    """
    return (_normed(x, eps)[0] * _per_row(scale, x.shape)).astype(x.dtype)


def _normed(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x by its root mean square, and the inverse of the latter; float32."""
    x32 = x.astype(jnp.float32)
    inv = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32 * inv, inv


def _per_row(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(scale.astype(jnp.float32), shape)


def _rms_norm_dgrad(x: jax.Array, scale: jax.Array, eps: float, g: jax.Array) -> jax.Array:
    normed, inv = _normed(x, eps)
    d_normed = g.astype(jnp.float32) * _per_row(scale, x.shape)
    return (inv * (d_normed - normed * (d_normed * normed).mean(-1, keepdims=True))).astype(x.dtype)


def _rms_norm_wgrad(x: jax.Array, scale: jax.Array, eps: float, g: jax.Array) -> jax.Array:
    by_token = g.astype(jnp.float32) * _normed(x, eps)[0]
    return by_token.sum(tuple(range(x.ndim - 1))).astype(scale.dtype)


def _rms_norm_bwd(eps, saved, g):  # type: ignore[no-untyped-def]
    x, scale = saved
    return _rms_norm_dgrad(x, scale, eps, g), _rms_norm_wgrad(x, scale, eps, g)


rms_norm.defvjp(lambda x, scale, eps: (rms_norm(x, scale, eps), (x, scale)), _rms_norm_bwd)


def linear(x: jax.Array, w: Any, n_in: int = 1, dtype: Any = None) -> jax.Array:
    """Contract the last `n_in` dims of x with the first `n_in` dims of w; in `dtype`, by default that of x.

    `w` is an array, or brings its own product along (`precision/product.py`). One two-dimensional product: with several
    batch dims left in, XLA transposes the operands of the weight gradient through memory.
    """
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    y_mo = _linear(x, product(w, n_in), dtype or x.dtype, like)
    return y_mo.reshape(*x.shape[: x.ndim - n_in], *w.shape[n_in:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(x: jax.Array, w: Any, dtype: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    return w.fprop(w.operand(x), dtype)


def _linear_fwd(x, w, dtype, like):  # type: ignore[no-untyped-def]
    a = w.operand(x)
    return w.fprop(a, dtype), (w.kept(a), w.kept_for_backward())


def _linear_bwd(dtype, like, saved, dy):  # type: ignore[no-untyped-def]
    a, w = saved
    return w.dgrad(dy, like.dtype).reshape(like.shape), w.wgrad(a, dy)


_linear.defvjp(_linear_fwd, _linear_bwd)


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

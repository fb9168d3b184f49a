"""RMSNorm, linear layers, SwiGLU FFN, embedding and output head.

Dims: b batch, t token, d hidden, f FFN inner, v vocabulary, n flattened tokens.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.params import Param
from deepseek_jax.model.swiglu import swiglu
from deepseek_jax.precision import linear as quantised

Params = Any

# Names of what the recompute policy "deepseek" drops and recomputes (report section 3.2.3).
RMSNORM = "rmsnorm"
MLA_UP = "mla_up"
# Name of what every recompute policy keeps: where each token's row goes, small and made by communication.
EXPERT_PLAN = "expert_plan"


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last dim, in float32; result in the dtype of `x` [..., d]; `scale` [d]."""
    x32 = x.astype(jnp.float32)
    inv = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return checkpoint_name((x32 * inv * scale.astype(jnp.float32)).astype(x.dtype), RMSNORM)


def linear(x: jax.Array, w: Any, n_in: int = 1) -> jax.Array:
    """Contract the last `n_in` dims of x with the first `n_in` dims of w, cast to the dtype of x.

    `w` is an array, or brings its own product along: a quantised `precision.linear.Weight`.

    One two-dimensional product: with several batch dims left in, XLA transposes the operands of the weight
    gradient through memory.
    """
    if hasattr(w, "multiply"):
        return w.multiply(x, n_in)
    batch, out = x.shape[: x.ndim - n_in], w.shape[n_in:]
    width = math.prod(w.shape[:n_in])
    return (x.reshape(-1, width) @ w.astype(x.dtype).reshape(width, -1)).reshape(*batch, *out)


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
    return linear(swiglu(linear(x, p["w_gate_df"]), linear(x, p["w_up_df"])), p["w_down_fd"])


def embed_params(cfg: ModelConfig) -> dict[str, Param]:
    return {"w_embed_vd": Param((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))}


def embed(p: Params, cfg: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Token ids int32 [...] -> embeddings [..., d] in the compute dtype."""
    return p["w_embed_vd"].astype(cfg.dtype)[tokens]


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
    return jnp.einsum("...d,dv->...v", h, w_dv, preferred_element_type=jnp.float32)

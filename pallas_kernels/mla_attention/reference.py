"""Defines what the attention means: float32 softmax over whole score matrices.

Legend: b batch, h heads, t query token, s key token, k query and key width, v value width.
"""

import jax
import jax.numpy as jnp


def visible(t: int, s: int, segments: jax.Array | None, q_offset: jax.Array | None) -> jax.Array:
    """Which keys each query sees: bool [b or 1, 1, t, s]; the arguments are those of the public function."""
    position_bt = jnp.arange(t)[None] + (0 if q_offset is None else jnp.reshape(q_offset, (-1, 1)))
    seen = jnp.arange(s)[None, None] <= position_bt[..., None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None])
    return seen[:, None]


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def _scores(q, k, segments, q_offset) -> jax.Array:
    """q k^T, -inf where a query does not see the key."""
    seen = visible(q.shape[2], k.shape[2], segments, q_offset)
    return jnp.where(seen, _dot("bhtk,bhsk->bhts", q, k), -jnp.inf)


def mla_attention(q, k, v, segments, q_offset) -> tuple[jax.Array, jax.Array]:
    """q [b, h, t, k], k [b, h, s, k], v [b, h, s, v] -> (out [b, h, t, v], lse [b, h, t])."""
    scores = _scores(q, k, segments, q_offset)
    lse = jax.nn.logsumexp(scores, axis=-1)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # of no key: all weights below become 0
    return _dot("bhts,bhsv->bhtv", jnp.exp(scores - lse[..., None]), v).astype(v.dtype), lse


def mla_attention_backward(q, k, v, segments, out, lse, dout) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v."""
    p = jnp.exp(_scores(q, k, segments, None) - lse[..., None])
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    ds = p * (_dot("bhtv,bhsv->bhts", dout, v) - delta)
    dq, dk = _dot("bhts,bhsk->bhtk", ds, k), _dot("bhts,bhtk->bhsk", ds, q)
    return dq.astype(q.dtype), dk.astype(k.dtype), _dot("bhts,bhtv->bhsv", p, dout).astype(v.dtype)
